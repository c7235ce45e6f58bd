"""A merge on its own: which adapter goes into which base, and where the result goes."""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import model_validator

from job import errors
from job.config import urls
from job.config.read import Places, made, overridden
from job.config.schema import Config, Model, Readable, Run, dequantizable
from job.config.section import Section
from job.config.training import Examine, Merge


class Adapter(Section):
    """An adapter that is in a store already."""

    url: Readable
    """s3://bucket/prefix, file:///path or hf://org/name@revision of a folder that PEFT wrote."""


class Merging(Section):
    """What `merge` needs of a config; its run.url is where the result goes."""

    run: Run
    model: Model
    adapter: Adapter
    merge: Merge = Merge()
    examine: Examine = Examine()

    @model_validator(mode="after")
    def _something_was_dequantized(self) -> Self:
        dequantizable(self.model, self.merge)
        return self


def merging(
    run: Config | None, given: dict[str, str | None], overrides: Iterable[str], verify: str | None = None
) -> Merging:
    """The merge that `given` (base, adapter, out) names, or that of the adapter of a `run` where it does not.

    `verify` says how far the result is verified: ``sums`` is ``examine.minutes: 0``, ``full`` refuses that.

    Raises `errors.ConfigError` with one line for each thing that is wrong.
    """
    tree: dict[str, dict[str, Any]] = {"run": {}, "model": {}, "adapter": {}, "merge": {}}
    if run:
        told = run.model_dump(mode="json")
        tree |= {
            "run": told["run"] | {"url": None},
            "model": told["model"],
            "merge": told["merge"],
            "examine": told["examine"],
        }
        tree["adapter"]["url"] = f"{run.run.url}/adapter"
    tree["run"].setdefault("name", "merge")
    for name, (section, key) in {
        "base": ("model", "base"),
        "adapter": ("adapter", "url"),
        "out": ("run", "url"),
    }.items():
        if given[name]:
            tree[section][key] = given[name]
        if not tree[section].get(key):
            more = "" if name == "out" else ", or the config or the URL of a run"
            raise errors.ConfigError(f"--{name} is missing: give its URL{more}")
    places = Places("the command line", {})
    order = made(overridden(tree, overrides, places), places, Merging)
    for name, url in (("--base", order.model.base), ("--adapter", order.adapter.url)):
        if urls.within(url, order.run.url) or urls.within(order.run.url, url):
            raise errors.ConfigError(f"{name} {url} and --out {order.run.url} lie in each other: give another --out")
    if verify == "full" and not order.examine.minutes:
        raise errors.ConfigError(
            "--verify full opens the result, and examine.minutes is 0: set examine.minutes above 0, or use "
            "--verify sums"
        )
    if verify == "sums":
        return order.model_copy(update={"examine": order.examine.model_copy(update={"minutes": 0.0})})
    return order
