"""Bases that see images: records with images become what the model sees, and its language part learns from them."""

import base64
import io
import json
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seeing
import torch
from conftest import ROOT, S3, take_back
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from job import config, errors, inputs
from job.model import lora, tokenizer, vision, weights
from job.model.vision import Vision
from job.prepare import pictures
from job.prepare.formats import Example, convert
from job.prepare.tokens import Renderer, Row, marked
from job.prepare.turns import IMAGE, BadRecordError
from job.pull import look
from job.train.pictures import Collator

Job = Callable[..., subprocess.CompletedProcess[str]]
ANSWER = {"role": "assistant", "content": "It is red."}
ASKED = {"role": "user", "content": "What colour is it?"}
SHOWN = f"{IMAGE}What colour is it?"


def turn(*parts: object) -> dict[str, object]:
    """A question of the user, in parts."""
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def shown(number: int) -> dict[str, object]:
    """An image as a part of a turn."""
    return {"type": "image", "image": seeing.picture(number)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base of a family, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("seeing")

    def make(family: str) -> Path:
        return folder / family if (folder / family).exists() else seeing.base(family, folder / family)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """24 images with a question and an answer each, and one question without an image."""
    (tmp_path / "data" / "img").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for number in range(24):
        (tmp_path / "data" / "img" / f"{number}.png").write_bytes(seeing.picture(number))
        asked = turn({"type": "image", "image": f"img/{number}.png"}, "What colour is it?")
        rows.append({"messages": [asked, {"role": "assistant", "content": "red" if number % 2 else "blue"}]})
    rows.append({"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]})
    write(tmp_path / "data" / "train.jsonl", rows)
    return tmp_path / "data"


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def about(base: Path, place: Path, **more: dict[str, object]) -> dict[str, dict[str, object]]:
    """What a run on images is told besides what every tiny run is."""
    told: dict[str, dict[str, object]] = {
        "model": {"base": str(base), "compute_dtype": "float32"},
        "data": {"train": [f"{place}/train.jsonl"], "eval": [], "eval_fraction": 0.2, "max_length": 160},
    }
    return {**more, **{section: {**told.get(section, {}), **more.get(section, {})} for section in told}}


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("messages", {"messages": [turn({"type": "image", "image": "a.png"}, "What colour is it?"), ANSWER]}),
        (
            "messages",
            {"messages": [turn({"type": "image_url", "image_url": {"url": "a.png"}}, "What colour is it?"), ANSWER]},
        ),
        ("messages", {"messages": [turn({"type": "image"}, "What colour is it?"), ANSWER], "images": ["a.png"]}),
        ("messages", {"messages": [ASKED, ANSWER], "image": "a.png"}),
        ("messages", {"messages": [ASKED, ANSWER], "images": [{"path": "a.png", "bytes": None}]}),
        (
            "conversations",
            {
                "image": "a.png",
                "conversations": [
                    {"from": "human", "value": "<image>What colour is it?"},
                    {"from": "gpt", "value": "It is red."},
                ],
            },
        ),
        ("instruction", {"instruction": "What colour is it?", "output": "It is red.", "images": ["a.png"]}),
        ("prompt-completion", {"prompt": "What colour is it?", "completion": "It is red.", "image": "a.png"}),
    ],
)  # fmt: skip
def test_images_are_found_wherever_records_name_them(name: str, record: dict[str, object]) -> None:
    """In the turn, besides it with a place in the turn, with the word <image>, or before the first question."""
    example = convert(record, name, "\n")

    assert example == Example(({"role": "user", "content": SHOWN}, ANSWER), images=("a.png",))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [turn({"type": "image"}), ANSWER], "images": ["a", "b"]}, "names 2 images besides .* has 1 pl"),
        ({"messages": [turn({"type": "image"}, "?"), ANSWER]}, "names 0 images besides its turns, and has 1 places"),
        ({"messages": [ASKED, ANSWER], "image": 3}, "an image is of type int, not a path, a URL or bytes"),
        ({"messages": [ASKED, {**ANSWER, "content": [{"type": "image", "image": "a"}]}]}, "answers are text"),
        ({"messages": [turn({"type": "audio"}), ANSWER]}, "a part of turn 1 is of type audio, neither text nor image"),
        ({"messages": [{"role": "user", "content": f"{IMAGE}?"}, ANSWER]}, r"holds U\+FDD0, which is no character"),
        ({"messages": [ASKED, ANSWER], "system": IMAGE}, r"holds U\+FDD0, which is no character"),
        ({"messages": [ASKED, ANSWER], "images": ["a", {"bytes": None}]}, "image 2 of its images is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_images_is_told(record: dict[str, object], message: str) -> None:
    """With the numbers that were seen."""
    with pytest.raises(BadRecordError, match=message):
        convert(record, "messages", "\n")


def test_images_are_taken_from_their_folder_by_path_url_or_as_they_are(tmp_path: Path) -> None:
    """Also those that the record itself holds, as Parquet files of the hub do, and pages of the web."""
    (tmp_path / "a b.png").write_bytes(b"beside")
    file = inputs.DataFile("s3://b/d/x.jsonl", tmp_path / "x", "", images=inputs.Images("s3://b/d", tmp_path, ""))
    inline = f"data:image/png;base64,{base64.encodebytes(b'in line' * 12).decode()}"
    plain = base64.b64encode(b"plain" * 400).decode()

    example = pictures.opened(Example(images=("a b.png", "s3://b/d/a b.png", b"held", inline, plain)), file)

    assert example.images == (b"beside", b"beside", b"held", b"in line" * 12, b"plain" * 400)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("none.png", "the image none.png is not in s3://b/d"),
        ("https://example.org/a.png", "is not below s3://b/d: put it there, or set data.images"),
        ("s3://b/other/a.png", "is not below s3://b/d"),
        ("../secret", "leads out of s3://b/d"),
        ("/etc/passwd", "leads out of s3://b/d"),
        ("data:image/png;base64,###", "is not base64"),
        ("a\0b.png", "the image a\0b.png is not in s3://b/d"),
        (f"{'a' * 300}.png", "is not in s3://b/d"),
        ("secret", r"the image secret is not called as images are \(.jpg"),
        ("_new/a.png", "the image _new/a.png is not called as images are"),
    ],
)
def test_an_image_that_cannot_be_had_is_named(image: str, message: str, tmp_path: Path) -> None:
    """Nothing outside of the folder is read, whatever a record says."""
    file = inputs.DataFile("s3://b/d/x.jsonl", tmp_path / "x", "", images=inputs.Images("s3://b/d", tmp_path, ""))

    with pytest.raises(BadRecordError, match=message):
        pictures.opened(Example(images=(image,)), file)


def rendered(base: Path, *records: dict[str, object], max_length: int = 500) -> list[Row]:
    """Rows of the records, of which none is bad."""
    words = tokenizer.load(base)
    made = Renderer(words, max_length, "assistant", Vision(base, words, None))
    rows = list(made.rows([convert(record, "messages", "\n") for record in records]))
    bad = [row for row in rows if isinstance(row, BadRecordError)]
    assert not bad
    return [row for row in rows if isinstance(row, Row)]


LONG = {
    "messages": [
        turn(shown(1), "What colour?", shown(8)),
        ANSWER,
        turn("And ", shown(5)),
        {"role": "assistant", "content": "red, or blue"},
    ]
}  # fmt: skip
SAID = {"messages": [turn("What colour?"), ANSWER, turn("And "), LONG["messages"][-1]]}
PLAIN = {"messages": [ASKED, ANSWER]}


@pytest.mark.parametrize("family", seeing.SPECIAL)
def test_the_answers_are_trained_wherever_images_moved_them(family: str, bases: Callable[[str], Path]) -> None:
    """Each image becomes as many tokens as the family wants; the trained ones are the answers and their ends."""
    row, plain = rendered(bases(family), LONG, PLAIN)

    words = tokenizer.load(bases(family))
    for each, answers in ((row, ["It is red.", "red, or blue"]), (plain, ["It is red."])):
        parts = marked(words, each).split("⟦")[1:]
        assert [part.partition("⟧")[0] for part in parts] == [f"{answer}<|im_end|>" for answer in answers]
    batch = Vision(bases(family), words, None).batch([row.text], [row.images])
    assert batch["input_ids"][0].tolist() == row.input_ids
    seen = Counter(row.input_ids) - Counter(rendered(bases(family), SAID)[0].input_ids)
    assert seen.total() >= 3 * 4  # three images, of at least four tokens each


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("family", seeing.SPECIAL)
def test_the_language_part_learns_and_what_sees_stays_whole(
    family: str, quantization: str, bases: Callable[[str], Path]
) -> None:
    """Over batches in which some examples have images and others have none, in all their numbers."""
    words = tokenizer.load(bases(family))
    rows = rendered(bases(family), LONG, PLAIN)
    vision = Vision(bases(family), words, None)
    batch = Collator(vision, "<|im_end|>" * 2, always=False)(
        [{"input_ids": r.input_ids, "labels": r.labels, "text": r.text, "pictures": list(r.images)} for r in rows]
    )
    settings = config.Model.model_validate({"base": bases(family).as_uri(), "quantization": quantization})
    network = weights.for_training(bases(family), settings)

    adapted = lora.adapted(network, config.Lora(dropout=0.0))
    lora.draw(adapted, 0)
    adapted(**batch).loss.backward()

    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert all("language_model" in name or "text_model" in name for name in trained)
    assert all(p.grad is not None and p.grad.any() for name, p in trained.items() if "lora_B" in name)
    seen = [m for name, m in adapted.named_modules() if "vision" in name and type(m).__name__.startswith("Linear")]
    assert all(type(module) is torch.nn.Linear for module in seen)


@pytest.mark.parametrize("family", seeing.SPECIAL)
def test_a_batch_without_images_is_given_one_that_changes_nothing(family: str, bases: Callable[[str], Path]) -> None:
    """Where processes share the model out: all of them go through all of it, or they wait for each other for ever."""
    base = bases(family)
    words = tokenizer.load(base)
    (row,) = rendered(base, {"messages": [{"role": "user", "content": "Hi."}, ANSWER]})
    (long,) = rendered(base, PLAIN)
    rows = [{"input_ids": r.input_ids, "labels": r.labels, "text": r.text, "pictures": []} for r in (long, row)]
    rows.append({"input_ids": [5, 6], "labels": [-100, -100], "text": "", "pictures": []})
    settings = config.Model.model_validate({"base": base.as_uri(), "quantization": "none", "compute_dtype": "float32"})
    network = lora.adapted(
        weights.for_training(base, settings), config.Lora.model_validate({"dropout": 0.0, "targets": "all-linear"})
    )
    lora.draw(network, 0)
    vision = Vision(base, words, None)

    def learn(rows: list[dict[str, Any]], *, always: bool) -> tuple[float, set[str]]:
        """The loss of the rows, and which parameters they reach."""
        network.zero_grad()
        loss = network(**Collator(vision, "<|im_end|>" * 2, always=always)(rows)).loss
        loss.backward()
        return float(loss.detach()), {name for name, p in network.named_parameters() if p.grad is not None}

    (shown_row,) = rendered(base, LONG)
    shown = {"input_ids": shown_row.input_ids, "labels": shown_row.labels, "text": shown_row.text}
    _, every = learn([{**shown, "pictures": list(shown_row.images)}], always=True)
    for given in (rows, rows[:2]):
        usual, some = learn(given, always=False)
        loss, reached = learn(given, always=True)
        assert loss == pytest.approx(usual, rel=1e-5)
        assert some < reached == every


@pytest.mark.parametrize("family", seeing.SPECIAL)
def test_a_base_that_sees_is_shared_out_while_it_is_loaded(family: str, bases: Callable[[str], Path]) -> None:
    """Also where transformers gives its parts other names than its files do: no process needs room for all of it."""
    settings = config.Model.model_validate({"base": bases(family).as_uri(), "quantization": "none"})

    outline = weights.outline(bases(family), settings)

    assert outline
    network, pieces = outline
    pieces.fill(network, "")
    network.tie_weights()
    whole = weights.for_training(bases(family), settings).state_dict()
    torch.testing.assert_close(dict(network.state_dict()), dict(whole), rtol=0, atol=0)


def test_all_linear_trains_what_sees_too(bases: Callable[[str], Path]) -> None:
    """And names of layers mean those of the language part, or whole names any."""
    base = bases("qwen2_5_vl")
    settings = config.Model.model_validate({"base": base.as_uri(), "quantization": "none"})

    def layers(targets: object) -> set[str]:
        adapted = lora.adapted(
            weights.for_training(base, settings), config.Lora.model_validate_json(json.dumps({"targets": targets}))
        )
        return {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name}

    language = layers("auto")
    assert all(".language_model." in name for name in language)
    assert layers("all-linear") > language
    assert any(".visual." in name for name in layers("all-linear"))
    assert layers(["gate_proj"]) == {name for name in language if name.endswith("gate_proj")}
    assert len(layers(["model.visual.merger.mlp.0"])) == 1


OTHERS = [name for name in seeing.SPECIAL if name != "qwen2_5_vl"]


@pytest.mark.slow
@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.every_commit), *OTHERS])
def test_a_run_on_images_goes_on_exactly_and_ends_in_a_model_that_sees(
    family: str, bases: Callable[[str], Path], folder: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Two steps done again after a stop give the same adapter; the merged folder is the base with it, and answers."""
    base = bases(family)
    looks = {"minutes": 5, "prompts": 2, "tokens": 8}
    described = tiny_run(**about(base, folder, merge={"dtype": "float32"}, examine=looks))

    first = job("run", described, "--set", "examine.minutes=0")
    before = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    take_back(tmp_path / "run", 6)
    second = job("run", described)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    after = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    row = rendered(base, LONG)[0]
    batch = Vision(tmp_path / "run" / "merged", tokenizer.load(tmp_path / "run" / "merged"), None).batch(
        [row.text], [row.images]
    )
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    whole = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    plain = whole(**batch).logits
    adapted = PeftModel.from_pretrained(whole, str(tmp_path / "run" / "adapter"))
    torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits, rtol=1e-4, atol=1e-4)
    assert (merged(**batch).logits - plain).abs().max() > 1e-2
    seen = json.loads((tmp_path / "run" / "report" / "seen.json").read_text())
    facts = json.loads((tmp_path / "run" / "adapter" / "training.json").read_text())
    assert seen["on"] == facts["loss_measured_on"] == "eval"
    assert "could not be verified" not in second.stderr
    assert seen["loss"]["trained"] == pytest.approx(facts["loss_after"], rel=1e-3)
    assert seen["loss"]["base"] == pytest.approx(facts["loss_before"], rel=1e-3)
    assert len(seen["answers"]) == 2
    assert {each["wanted"].removesuffix("<|im_end|>").strip() for each in seen["answers"]} <= {"red", "blue", "hi"}
    assert all("What colour is it?" in each["prompt"] for each in seen["answers"])
    assert any(each["tuned"].strip() in ("red", "blue") for each in seen["answers"])


@pytest.mark.slow
@pytest.mark.every_commit
def test_images_come_from_the_store_with_the_data(
    bases: Callable[[str], Path], folder: Path, tiny_run: Callable[..., Path], job: Job, s3: S3, bucket: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    """By the folder that the config names, and only once: the second start finds them prepared."""
    s3.upload(folder / "img", bucket, "pictures/img")
    s3.upload(folder, bucket, "records")
    told = about(
        bases("qwen2_5_vl"), folder,
        data={"train": [f"s3://{bucket}/records/train.jsonl"], "images": f"s3://{bucket}/pictures"},
    )  # fmt: skip

    outcome = job("run", tiny_run(**told))

    assert outcome.returncode == 0, outcome.stderr
    assert f"s3://{bucket}/pictures: 24 file(s)" in outcome.stderr
    (prepared,) = (tmp_path / "cache" / "prepared").glob("*/train.arrow")
    rows = Dataset.from_file(str(prepared))
    kept = {image for row in rows for image in row["pictures"]}
    assert kept <= {seeing.picture(number) for number in range(24)}
    assert len(kept) > 12


@pytest.mark.slow
def test_an_image_that_changed_is_prepared_anew(
    bases: Callable[[str], Path], folder: Path, tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Though the records and their names are the same."""
    told = about(bases("qwen2_5_vl"), folder, train={"max_steps": 2, "eval_every": 2})
    assert job("run", tiny_run(**told)).returncode == 0
    (folder / "img" / "3.png").write_bytes(seeing.picture(103))

    again = job("run", tiny_run(**{**told, "run": {"url": f"{tmp_path}/another"}}))

    assert again.returncode == 0, again.stderr
    assert "prepared data are here already" not in again.stderr
    found = [Dataset.from_file(str(p)) for p in (tmp_path / "cache" / "prepared").glob("*/*.arrow")]
    assert any(seeing.picture(103) in row["pictures"] for rows in found for row in rows)


def test_images_in_parquet_are_read_as_the_hub_keeps_them(
    bases: Callable[[str], Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """As bytes in the record; there is no folder then."""
    asked = {"role": "user", "content": "<image>What colour?"}
    shown = [{"bytes": seeing.picture(number), "path": None} for number in range(16)]
    rows = [{"messages": [asked, ANSWER], "images": [image]} for image in shown]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")

    made = prepared(tmp_path / "train.parquet", model=bases("llava"))

    assert "<image> (x 16)What colour?" in (made / "sample.txt").read_text(encoding="utf-8")
    held = Dataset.from_file(str(made / "train.arrow"))
    assert [row["pictures"] for row in held] == [[image["bytes"]] for image in shown]


@pytest.mark.slow
def test_text_alone_is_prepared_for_them_as_for_any_base(
    bases: Callable[[str], Path], tiny_run: Callable[..., Path], job: Job, tmp_path: Path
) -> None:
    """Without a processor in each batch, and packed if asked to."""
    outcome = job("run", tiny_run(model={"base": str(bases("gemma3"))}, data={"packing": True}))

    assert outcome.returncode == 0, outcome.stderr
    (prepared,) = (tmp_path / "cache" / "prepared").glob("*/train.arrow")
    assert "pictures" not in Dataset.from_file(str(prepared)).column_names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": {"packing": True}}, "data.packing: the records have images, which are not packed"),
        ({"data": {"max_length": 20}}, "its images end after 23 tokens, and data.max_length is 20: raise it, or make"),
        ({"data": {"images": "/nowhere/at/all"}}, "data.images: file:///nowhere/at/all holds no images"),
        ({"model": {"base": "TINY"}}, "has images, and the base model does not see them"),
        ({"model": {"base": "TINY"}, "data": {"images": "DATA"}}, "sees no images: leave it out, or use a base that"),
    ],
)
def test_what_cannot_be_done_with_images_is_refused(
    more: dict[str, dict[str, object]], message: str, bases: Callable[[str], Path], folder: Path, tiny_model: Path,
    tiny_run: Callable[..., Path], job: Job,
) -> None:  # fmt: skip
    """Before anything is trained."""
    places: dict[object, str] = {"TINY": str(tiny_model), "DATA": str(folder)}
    given = {section: {k: places.get(str(v), v) for k, v in keys.items()} for section, keys in more.items()}

    outcome = job("run", tiny_run(**about(bases("qwen2_5_vl"), folder, **given)))

    assert outcome.returncode == 64
    assert message in outcome.stderr
    assert not (folder.parent / "run" / "checkpoints").exists()


def test_a_broken_image_is_named_with_its_record(
    bases: Callable[[str], Path], folder: Path, prepared: Callable[..., Path]
) -> None:
    """It can be left out, and is counted."""
    (folder / "img" / "3.png").write_bytes(b"GIF89a no more")
    path, told = folder / "train.jsonl", {"model": bases("qwen2_5_vl"), "images": folder}

    with pytest.raises(errors.DataError, match=r"train\.jsonl:4: an image cannot be read: "):
        prepared(path, **told)
    made = prepared(path, **told, skip_bad_share=0.1)

    assert json.loads((made / "data.json").read_text(encoding="utf-8"))["train"]["bad"] == 1


def test_large_images_are_made_smaller_if_asked_to(bases: Callable[[str], Path]) -> None:
    """Before the processor of the family decides how many tokens they take."""
    base = bases("llava")
    words = tokenizer.load(bases("qwen2_5_vl"))
    large, small = (
        Vision(bases("qwen2_5_vl"), words, pixels).read("<|image_pad|>", [seeing.picture(8)]).ids
        for pixels in (None, 300)
    )

    assert len(small) < len(large)
    with pytest.raises(ValueError, match="an image cannot be read"):
        Vision(base, tokenizer.load(base), None).read("<image>", [b"nothing"])


@pytest.mark.parametrize(
    ("mode", "white"),
    [("I;16", 1.0), ("RGBA", 1.0), ("P", 0.0), ("LA", 1.0), ("CMYK", 1.0), ("1", 0.0), ("L", 0.0)],
)
def test_images_of_any_kind_are_seen_as_they_look(mode: str, white: float) -> None:
    """Those of 16 bits are no brighter than others, and what is transparent shows white."""
    colour = {"I;16": 40_000, "RGBA": (0, 0, 0, 0), "LA": (0, 0), "CMYK": (0, 0, 0, 0)}.get(mode, 0)
    image = Image.new(mode, (4, 4), colour)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode in ("CMYK", "I;16") else "PNG")

    seen = vision._coloured(Image.open(file))

    assert seen.mode == "RGB"
    level = seen.getpixel((0, 0))[0]
    assert level == (40_000 // 256 if mode == "I;16" else 255 * white)


def test_what_pillow_stumbles_over_is_a_broken_image() -> None:
    """Its own errors are some of many: here a width that is no number, in the notes of a photo that is to be turned."""
    wide, turned = struct.pack("<HHI4s", 0x0100, 2, 4, b"wid"), struct.pack("<HHII", 0x0112, 3, 1, 6)
    notes = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + wide + turned + bytes(4)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", exif=notes)
    eyes = Vision.__new__(Vision)
    eyes._max_pixels = None

    with pytest.raises(ValueError, match="an image cannot be read: "):
        eyes._opened(file.getvalue())


def test_an_image_that_is_only_waited_for_is_not_cut_up(bases: Callable[[str], Path]) -> None:
    """SmolVLM makes a thousand tokens of the smallest image, if it may."""
    base = bases("smolvlm")
    (row,) = rendered(base, PLAIN)
    eyes = Vision(base, tokenizer.load(base), None)
    given = {"input_ids": row.input_ids, "labels": row.labels, "text": row.text, "pictures": []}

    batch = Collator(eyes, "", always=True)([given])

    assert batch["pixel_values"].shape[:2] == (1, 1)
    assert eyes.batch([eyes.placeholder], [[seeing.picture(1)]])["pixel_values"].shape[1] > 1


def test_numbers_of_which_nobody_says_how_bright_they_are_are_refused() -> None:
    """Guessing would make all of them black, or white."""
    with pytest.raises(ValueError, match="it has 32 bits a pixel"):
        vision._coloured(Image.new("F", (4, 4), 0.5))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "<image>\nWhat?"}, ANSWER], "image_path": "a"}, "names no image"),
        ({"messages": [ASKED, ANSWER], "images": [], "videos": ["a.mp4"]}, "has videos, and of what is no text only"),
    ],
)
def test_a_record_is_not_trained_on_without_what_it_shows(
    record: dict[str, object], message: str, bases: Callable[[str], Path], tmp_path: Path, prepared: Callable[..., Path]
) -> None:
    """Where the base could see it; `<image>` is a word like others for one that sees nothing."""
    path = write(tmp_path / "x.jsonl", [record])

    with pytest.raises(errors.DataError, match=message):
        prepared(path, model=bases("qwen2_5_vl"))


def test_what_stands_for_images_is_never_learned(bases: Callable[[str], Path]) -> None:
    """Also not where everything else is; and it does not pass in a text, where the model would look for an image."""
    base = bases("gemma3")
    words = tokenizer.load(base)
    renderer = Renderer(words, 500, "all", Vision(base, words, None))

    (row,) = renderer.rows([convert(LONG, "messages", "\n")])
    (bad,) = renderer.rows([convert({"messages": [turn("<image_soft_token>"), ANSWER]}, "messages", "\n")])

    assert isinstance(row, Row)
    number = words.convert_tokens_to_ids("<image_soft_token>")
    shown = [label for token, label in zip(row.input_ids, row.labels, strict=True) if token == number]
    assert shown == [-100] * 12
    assert row.labels[0] != -100
    assert str(bad) == "has <image_soft_token> in its text, which stands for what the model sees"


def test_a_processor_that_writes_more_than_images_is_refused(bases: Callable[[str], Path]) -> None:
    """As PaliGemma's: where the answers are in its text nobody could say."""
    base = bases("llava")
    eyes = Vision(base, tokenizer.load(base), None)
    whole = type(eyes._processor).__call__

    class Writing(type(eyes._processor)):  # type: ignore[misc]
        def __call__(self, text: list[str], **more: object) -> object:
            return whole(self, text=[f"Look: {each}" for each in text], **more)

    eyes._processor.__class__ = Writing
    with pytest.raises(errors.ModelError, match="does not tell what it does to a text with images"):
        eyes.read("<image>What?", [seeing.picture(1)])


def test_a_template_that_lies_in_a_file_of_its_own_is_found(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """As that of LLaVA 1.5 does: with another one it would be trained in a format that it does not know."""
    base = shutil.copytree(bases("llava"), tmp_path / "base")
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": template}))

    assert tokenizer.load(base).chat_template == template
    several = [{"name": "default", "template": template}, {"name": "tool_use", "template": "?"}]
    (base / "chat_template.json").write_text(json.dumps({"chat_template": several}))
    assert tokenizer.load(base).chat_template == template
    (base / "chat_template.json").write_text("{}")
    with pytest.raises(errors.ModelError, match=r"chat_template\.json holds no chat template \(KeyError"):
        tokenizer.load(base)


def test_nothing_is_brought_from_beside_data_in_the_root_of_a_bucket(s3: S3, bucket: str) -> None:
    """Everything that is in it lies there."""
    for key in ("train.jsonl", "a.png", "d/train.jsonl", "d/b.png"):
        s3.client().put_object(Bucket=bucket, Key=key, Body=b"x")

    assert look.images(None, f"s3://{bucket}/train.jsonl") is None
    beside, told = look.images(None, f"s3://{bucket}/d/train.jsonl"), look.images(f"s3://{bucket}", "s3://x/y")
    assert beside
    assert [entry.key for entry in beside.entries] == ["b.png"]
    assert told
    assert [entry.key for entry in told.entries] == ["a.png", "d/b.png"]


def test_the_example_of_the_readme_can_be_trained_on(
    bases: Callable[[str], Path], prepared: Callable[..., Path]
) -> None:
    """Every record of it, with its images; and the table has a line for it."""
    path = ROOT / "tests" / "data" / "images.jsonl"

    folder = prepared(path, model=bases("smolvlm"), images=path.parent)

    shown = [len(row["pictures"]) for row in Dataset.from_file(str(folder / "train.arrow"))]
    assert shown == [1, 2, 1]
    assert not json.loads((folder / "data.json").read_text(encoding="utf-8"))["train"]["ignored_keys"]
    assert "(tests/data/images.jsonl)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_tokens_that_are_not_those_prepared_stop_the_training(bases: Callable[[str], Path]) -> None:
    """Another version of the processor would put the labels elsewhere."""
    base = bases("llava")
    row = rendered(base, LONG)[0]
    given: dict[str, Any] = {"input_ids": [5, *row.input_ids[1:]], "labels": row.labels, "text": row.text}

    with pytest.raises(errors.DataError, match=r"makes other tokens of .* than when the data were prepared"):
        Collator(Vision(base, tokenizer.load(base), None), "", always=False)([{**given, "pictures": list(row.images)}])


def test_the_end_of_a_long_example_is_cut_behind_its_images(bases: Callable[[str], Path]) -> None:
    """Its batch has what was prepared, and no more."""
    base = bases("llava")
    whole = rendered(base, LONG)[0]
    row = rendered(base, LONG, max_length=len(whole.input_ids) - 4)[0]

    batch = Collator(Vision(base, tokenizer.load(base), None), "", always=False)(
        [{"input_ids": row.input_ids, "labels": row.labels, "text": row.text, "pictures": list(row.images)}]
    )

    assert row.truncated
    assert batch["input_ids"][0].tolist() == whole.input_ids[:-4]
    assert batch["labels"][0].tolist() == whole.labels[:-4]
