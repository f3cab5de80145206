"""Modules that are imported when they are first used: torch and its libraries take longer than most tests, which need none."""

import importlib
from typing import Any


class Module:
    """Stands for a module. What is set on it, by monkeypatch too, is set on the module."""

    __slots__ = ("_name",)

    def __init__(self, name: str):
        object.__setattr__(self, "_name", name)

    @property
    def __dict__(self) -> dict[str, Any]:
        return vars(importlib.import_module(self._name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_mock")):  # pytest asks for these of all that a test file holds
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(importlib.import_module(self._name), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(importlib.import_module(self._name), name)


torch, nn, functional = map(Module, ("torch", "torch.nn", "torch.nn.functional"))
diffusers, transformers, kornia = map(Module, ("diffusers", "transformers", "kornia"))
safetensors_torch = Module("safetensors.torch")
oracle, judges = Module("tests.oracles.inversion"), Module("tests.oracles.judges")
t5_oracles = Module("tests.oracles.t5")
pipelines = Module("tests.oracles.pipelines")
against_torch = Module("tests.tools.against_torch")
recipes_generator, recipes_referees, recipes_vqascore, train = (
    Module(f"referee_jax.shapes.{name}")
    for name in ("recipes_generator", "recipes_referees", "recipes_vqascore", "train")
)
