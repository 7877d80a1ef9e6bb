"""``python -m weightsync_client``: the ``weightsync`` command where no script is installed."""

from __future__ import annotations

from weightsync_client.cli import main

if __name__ == "__main__":
    main()
