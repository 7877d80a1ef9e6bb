"""``weightsync demo``: new weights into a real engine, and the proof that they are whole."""

from weightsync_client.demo.options import DemoOptions
from weightsync_client.demo.result import DemoResult
from weightsync_client.demo.run import run_demo

__all__ = ["DemoOptions", "DemoResult", "run_demo"]
