"""The methods of the package by name, beside "malmen" and "mend", which are editors."""

from __future__ import annotations

from malmend.methods.ft import FineTuning, FineTuningKL
from malmend.methods.lora import Lora
from malmend.methods.memit import Memit
from malmend.methods.ultraedit import UltraEdit

METHODS: dict[str, type] = {
    "ft": FineTuning,
    "ft-kl": FineTuningKL,
    "lora": Lora,
    "memit": Memit,
    "ultraedit": UltraEdit,
}
