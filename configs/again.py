"""The config of a run that there is, to do it again.

python -m fliqs_jax.main --config=configs/again.py:runs/digits --workdir=runs/again

`--config=runs/digits` is the same, from any folder.
"""

from fliqs_jax.runs.again import get_config

__all__ = ['get_config']
