"""Lets a process of the job stop at one exact moment. Python loads this by itself where the folder is on PYTHONPATH.

MOMENT says where, as JSON: the n-th ``call`` of ``function`` in ``module``, with ``argument`` among its arguments if
that is not empty, in the process that is named (``job`` or ``worker``), ``after`` the function instead of before it.
There it writes the ids of the job and of this process to ``reached`` and waits, so that the test can do what it likes
to a process that stands just there, until the test removes the file.

DELAY makes one worker slow instead, as JSON: the one of this ``rank`` sleeps ``seconds`` before the
n-th ``call`` of ``function`` in ``module``, or before each if ``call`` is 0; all of them do if
``rank`` is -1. If it names attributes, ``having`` these values, only a method of such an object
counts.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Moment:
    """One moment in the life of the job."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.module = told["module"]
        self._owner, self._name = told["function"].rpartition(".")[::2]
        self._call, self._after, self._argument = told["call"], told["after"], told["argument"]
        self._reached, self._count = Path(told["reached"]), itertools.count(1)

    def attach(self, module: ModuleType) -> None:
        """Put the wait around the function."""
        owner = functools.reduce(getattr, filter(None, self._owner.split(".")), module)
        original: Callable[..., Any] = getattr(owner, self._name)

        @functools.wraps(original)
        def wrapped(*given: object, **named: object) -> object:
            now = (not self._argument or self._argument in map(str, given)) and next(self._count) == self._call
            if now and not self._after:
                self._wait()
            result = original(*given, **named)
            if now and self._after:
                self._wait()
            return result

        setattr(owner, self._name, wrapped)

    def _wait(self) -> None:
        job = int(sys.argv[sys.argv.index("--parent") + 1]) if "worker" in sys.argv else os.getpid()
        written = self._reached.with_suffix(".part")
        written.write_text(json.dumps({"job": job, "here": os.getpid()}))
        written.rename(self._reached)
        while self._reached.exists():
            time.sleep(0.02)


class Delay:
    """A function that takes longer than it needs."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.module, self._function = told["module"], told["function"]
        self._seconds, self._call, self._count = told["seconds"], told["call"], itertools.count(1)
        self._having = told.get("having", {})

    def attach(self, module: ModuleType) -> None:
        """Put the sleep before the function."""
        owner_name, name = self._function.rpartition(".")[::2]
        owner = functools.reduce(getattr, filter(None, owner_name.split(".")), module)
        original: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(original)
        def delayed(*given: object, **named: object) -> object:
            wanted = all(getattr(given[0], name) == value for name, value in self._having.items())
            if wanted and self._call in (0, next(self._count)):
                time.sleep(self._seconds)
            return original(*given, **named)

        setattr(owner, name, delayed)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the module of the moment as Python would, and attaches the moment when it is loaded."""

    def __init__(self, moment: Moment | Delay) -> None:
        self._moment = moment

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._moment.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        load = loader.exec_module

        def load_and_attach(module: ModuleType) -> None:
            load(module)
            self._moment.attach(module)

        loader.exec_module = load_and_attach  # type: ignore[method-assign]
        return spec


if "MOMENT" in os.environ:
    told = json.loads(os.environ["MOMENT"])
    if ("worker" if "worker" in sys.argv else "job") == told["process"]:
        sys.meta_path.insert(0, Finder(Moment(told)))

if "DELAY" in os.environ and "worker" in sys.argv:
    told = json.loads(os.environ["DELAY"])
    if told["rank"] in (-1, int(os.environ.get("RANK", "0"))):
        sys.meta_path.insert(0, Finder(Delay(told)))
