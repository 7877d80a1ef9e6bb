"""Declared layouts of the common model families: for plans without an engine."""

from __future__ import annotations

from weightsync.families.config import ModelConfig
from weightsync.families.model import Model
from weightsync.families.registry import FAMILIES, declare
from weightsync.families.vllm import EngineGrid, engine_layouts

__all__ = ["FAMILIES", "EngineGrid", "Model", "ModelConfig", "declare", "engine_layouts"]
