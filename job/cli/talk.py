"""The commands `chat` and `generate`: the result of a run, or any model, answers."""

import contextlib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import click

from job import errors
from job.cli.program import Program, debugging, default_cache, found, group

if TYPE_CHECKING:
    from job.config import Sampling
    from job.generate import Place, Prompt
    from job.model.talk import Speaker
    from job.paths import Cache
    from job.preemption import Notice
    from job.prepare.records import Record

_NAMED = re.compile(r"((?P<name>[\w.-]+)=)?(?P<url>.*)")
_OPTIONS = [
    click.argument("run", required=False, metavar="[CONFIG|RUN_URL]"),
    click.option("--base", metavar="URL", help="The base model; by default that of the run."),
    click.option(
        "--adapter", "adapters", multiple=True, metavar="[NAME=]URL", help="An adapter for it; by default the run's."
    ),
    click.option("--merged", is_flag=True, help="The run's merged model, in place of base and adapter."),
    click.option(
        "--quantization", type=click.Choice(["nf4", "fp4", "int8", "none"]), help="By default as the run was trained."
    ),
    click.option("--cache", type=click.Path(path_type=Path), help="Where models are kept on this machine."),
    click.option("--temperature", type=float, help="0: always the likeliest token.  [default: 0.7]"),
    click.option("--top-p", type=float, help="[default: 0.9]"),
    click.option("--top-k", type=int, help="0: among all tokens.  [default: 20]"),
    click.option("--repetition-penalty", type=float, help="[default: 1.1]"),
    click.option("--max-tokens", type=int, help="Of an answer.  [default: 512]"),
    click.option("--seed", type=int, help="[default: 42]"),
    click.option("--stop", multiple=True, metavar="TEXT", help="Where an answer is over; may be given several times."),
]


def _speaking(command: Any) -> Any:  # noqa: ANN401 - click's
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@group.command()
@_speaking
@debugging
@click.pass_obj
def chat(program: Program, /, debug: bool, **given: Any) -> None:  # noqa: ANN401, FBT001 - click's
    """Talk to a model in the terminal: that of a run, or any base with any adapters for it."""
    from job import outcome

    def job(_notice: "Notice", after: ExitStack) -> None:
        from job.chat import Chat

        how = _sampling(given)
        speaker, _ = _speaker(program, given, after)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # one byte that is no text is no reason to leave
        if sys.stdin.isatty():
            import readline  # noqa: F401 - gives `input` a history, and keys that edit
        with _left_alone():
            Chat(speaker, how, sys.stdout).run(input if sys.stdin.isatty() else _piped)

    outcome.conclude(job, as_json=False, debug=debug)


@group.command()
@_speaking
@click.option("--prompt", metavar="TEXT", help="One question, whose answer is printed.")
@click.option("--input", "file", metavar="URL", help="Records with a prompt, messages, an instruction or a text each.")
@click.option("--out", metavar="URL", help="Where the answers to them go: the same lines with an answer.")
@click.option(
    "--batch", type=click.IntRange(1), default=8, show_default=True, help="Prompts that are answered at once."
)
@debugging
@click.pass_obj
def generate(program: Program, /, debug: bool, **given: Any) -> None:  # noqa: ANN401, FBT001 - click's
    """Answer one question, or a file of them: in their order, and gone on with where it stopped."""
    from job import outcome

    def job(_notice: "Notice", after: ExitStack) -> None:
        from job import generate
        from job.model import tokenizer

        if bool(given["prompt"]) == bool(given["file"]) or bool(given["file"]) != bool(given["out"]):
            raise errors.ConfigError("give either --prompt, or --input and --out")
        if given["out"] and given["out"].endswith("/"):
            raise errors.ConfigError(f"--out {given['out']} is a folder: give the name of a file in it too")
        if len(given["adapters"]) > 1:
            raise errors.ConfigError("--adapter: one adapter answers a file; give one, and start once for each")
        how = _sampling(given)
        read = [] if given["prompt"] else _records(program, given)
        prompts(read)  # what cannot be answered is said before a model is brought
        speaker, made_of = _speaker(program, given, after)
        if given["prompt"]:
            with _left_alone():
                click.echo(generate.one(given["prompt"], speaker, how))
        else:
            asked = prompts(read, tokenizer.input_heading(speaker.words))
            generate.answers(asked, speaker, how, given["batch"], _place(given, made_of, how, asked))

    outcome.conclude(job, as_json=False, debug=debug)


def _speaker(program: Program, given: Mapping[str, Any], after: ExitStack) -> "tuple[Speaker, str]":
    """Who answers, and what he is made of."""
    from job import config, convert, inputs, manifest, pull
    from job.convert.adapters import translated
    from job.model.talk import Speaker

    run = found(given["run"]) if given["run"] else None
    merged = f"{run.run.url}/merged" if run and given["merged"] else None
    url = merged or given["base"] or (run.model.base if run else None)
    if not url or (given["merged"] and (not run or given["base"] or given["adapters"])):
        raise errors.ConfigError("give a run (its config or its URL), perhaps with --merged, or --base and --adapter")
    told = run.model.model_dump(mode="json") if run else {}
    quantization = given["quantization"] or ("none" if merged or not told else told["quantization"])
    settings = config.Model.model_validate({**told, "base": config.absolute(url), "quantization": quantization})
    named = [_NAMED.fullmatch(each) for each in given["adapters"]]
    adapters = {each["name"] or f"adapter{number}": each["url"] for number, each in enumerate(named, 1) if each}
    if len(adapters) < len(named):
        raise errors.ConfigError("--adapter: two have the same name: give each one of its own, as in NAME=URL")
    if run and not merged and not adapters:
        adapters = {"tuned": f"{run.run.url}/adapter"}
    disk = _disk(program, given)
    brought = {name: pull.adapter(config.absolute(link), disk) for name, link in adapters.items()}
    base = pull.base(settings.base, disk)
    folders = {}
    for name, folder in brought.items():
        inputs.belongs(base, folder)
        folders[name] = translated(folder, base, disk, after)
    made_of = [base.digest, settings.model_dump_json(), *(manifest.of(folder).digest for folder in folders.values())]
    return Speaker(convert.native(base, disk, after).path, settings, folders), json.dumps(made_of)


def _disk(program: Program, given: Mapping[str, Any]) -> "Cache":
    from job import paths

    made = paths.Cache.of(given["cache"] or default_cache(program.environ), "talk")
    made.make()
    return made


def _sampling(given: Mapping[str, Any]) -> "Sampling":
    from job import config

    told = {key: given[key] for key in config.Sampling.model_fields if given.get(key) not in (None, ())}
    return config.sampling(told)


def _records(program: Program, given: Mapping[str, Any]) -> "list[tuple[str, Record]]":
    """What is in the file of questions, each with its place."""
    from job import config, pull
    from job.prepare import records

    source = config.Source(url=config.absolute(given["file"]))
    files = pull.data([source], _disk(program, given))
    found = [(f"{file.url}:{each.place}", each) for file in files for each in records.read(file.path, file.url)]
    if not found:
        raise errors.DataError(f"--input: {source.url} holds no prompts")
    return found


def prompts(read: "Sequence[tuple[str, Record]]", input_heading: str = "\n\n") -> "list[Prompt]":
    """What the records ask, as training would; raises `errors.DataError` with the place of one that asks nothing."""
    from job import generate
    from job.prepare.asked import asked
    from job.prepare.turns import BadRecordError

    made = []
    for where, record in read:
        if record.value is None:
            raise errors.DataError(f"{where}: {record.reason}")
        generate.check(record.value, where)
        try:
            example = asked(record.value, input_heading)
        except BadRecordError as e:
            raise errors.DataError(f"{where}: {e}") from e
        made.append(generate.Prompt(record.value, where, example.messages, example.text, example.tools))
    return made


def _place(given: Mapping[str, Any], made_of: str, how: "Sampling", prompts: "Sequence[Prompt]") -> "Place":
    from job import config, generate, storage

    url = config.absolute(given["out"])
    folder, _, name = url.rpartition("/")
    if url.startswith("file:"):
        name = unquote(name)
    if url.startswith("file:") and Path(unquote(url.removeprefix("file://"))).is_dir():
        raise errors.ConfigError(f"--out {given['out']} is a folder: give the name of a file in it too")
    asked = [made_of, how.model_dump(mode="json"), given["batch"], [dict(each.record) for each in prompts]]
    return generate.Place(storage.connect(folder), name, json.dumps(asked))


@contextlib.contextmanager
def _left_alone() -> Iterator[None]:
    """End quietly when the user leaves by Ctrl-C, or nobody reads what is written any more."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        click.echo("", err=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end


def _piped(_prompt: str) -> str:
    """A line of what is piped in."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
