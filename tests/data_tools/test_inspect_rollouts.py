"""The page of rollouts: what a model wrote stays text, in a real browser too; filters, counts, and a bounded size."""

from __future__ import annotations

import html
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_tools import cli, inspect_rollouts, untrusted_text
from data_tools.rollouts import BadGroup, RolloutFiles, find_rollouts, parse_group
from megatron_glmv.config.rl import AlgorithmConfig
from megatron_glmv.rl.advantage import group_advantages
from megatron_glmv.rl.rollout_files import rollout_file, write_rollouts
from megatron_glmv.rl.types import Answer, Group, Prompt, Reward, Rollout, Task
from tests.data.clips import clip
from tests.data.pictures import draw, encode
from tests.data_tools.browser import browse, find_chromium

NASTY = [
    "</div></section></main></body><script>document.title = 'broken in'</script>",
    "<img src=x onerror=\"document.title = 'broken in'\">",
    "</textarea></script></style><!-- <h1>",
    "<svg onload=document.title='broken'>&lt;b&gt; &amp;",
    "safe\u202etxt.exe\u200b\u0000\ud800 \u2028end\u2066",
    "<think>first <b>2</b></think>\n<answer>It is <|begin_of_box|>7<script><|end_of_box|></answer><|user|>",
    "no opening tag</think>seven",
    "<think>never closed " + "x" * 40,
]


def reward(value: float | None, reason: str = "") -> Reward:
    return Reward(value, None if value is None else value == 1, reason or {1: "right", None: "timeout"}.get(value, "wrong"), "")


def group(key: str, texts: list[str], rewards: list[float | None], *, domain: str = "math", **task: Any) -> Group:
    answers = []
    for text, value in zip(texts, rewards, strict=True):
        inserted = np.zeros(8, dtype=bool)
        inserted[:2] = value is None
        rollout = Rollout(np.zeros(8, dtype=np.int64), np.zeros(8, dtype=np.float32), inserted, "stop", text)
        answers.append(Answer(rollout, reward(value)))
    task = {"question": "How many?", "answer": "7", **task}
    return Group(Prompt(Task(key, domain, **task), np.zeros(30, dtype=np.int64)), tuple(answers))


def save(run: Path, step: int, groups: list[Group], chosen: set[int]) -> Path:
    path = rollout_file(run, step)
    advantages = group_advantages(groups, AlgorithmConfig())
    write_rollouts(path, step, groups, chosen, advantages, ["very_hard"] * len(groups))
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three iterations: hostile texts, pictures, a video, a picture that is gone, and a line that is broken."""
    base = tmp_path_factory.mktemp("rollouts")
    (base / "one.jpg").write_bytes(encode(draw(80, 150, 1), "JPEG"))
    (base / "clip.mp4").write_bytes(clip(61, 60, 100))
    (base / "torn.png").write_bytes(encode(draw(80, 150, 1), "PNG")[:90])
    run = base / "rl<b>"
    media = (
        str(base / "one.jpg"),
        str(base / "gone.jpg"),
        str(base / "clip.mp4"),
        str(base / "torn.png"),
        "https://x.example/a.png",
    )
    nasty = [f"{text} {number}" for number, text in enumerate(NASTY)]
    first = [
        group("<script>key", nasty, [1, 0, 0, 0, 0, 1, None, 0], media=media, question="<script>document.title=1</script>?"),
        group("all right", ["7"] * 4, [1] * 4),
        group("boxes", ["a", "b", "c", "d"], [0.25, 0.5, 0.75, 1], domain="<i>grounding", answer=[[1, 2, 3, 4]]),
        group("down", ["a", "b"], [None, None]),
    ]
    save(run, 1, first, {0, 2})
    save(run, 2, [group("harder", ["6", "7"], [0, 1])], {0})
    with save(run, 12, [group("later", ["6", "6"], [0, 0])], set()).open("ab") as file:
        file.write(b'{"step": 12, "domain": 3}\nnot json\n')
    return run


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_chromium()


def write(run: Path, page: Path, **options: Any) -> dict[str, Any]:
    return inspect_rollouts.inspect_rollouts(find_rollouts(run), page, title=run.name, **options)


def test_what_a_model_wrote_is_text(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    report = write(run_folder, page)
    assert (report["iterations"], report["groups"], report["shown"], report["bad_lines"]) == (3, 6, 6, 2)
    text = page.read_text(encoding="utf-8")
    assert len(re.findall("<script", text)) == 1, "a script that is not the page's"
    assert not re.search(r"<img(?! src=\"data:)|<h1>(?!rl)|<svg onload|<textarea", text)
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(""", text), "a resource from outside"
    assert not re.search("[\u202e\u200b\u0000\u2028\u2066\ud800]", text), "a character that hides or reorders"
    for number in ("202E", "200B", "0000", "D800", "2028", "2066"):
        assert f"U+{number}" in text
    assert "broken in" in text
    assert "rl&lt;b&gt;" in text


def test_what_stands_of_an_answer(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    report = write(run_folder, page, domain="math", iterations="1")
    assert (report["iterations"], report["groups"], report["answers"]) == (1, 3, 14)
    text = page.read_text(encoding="utf-8")
    assert "<summary>thinking, 14 characters</summary>first &lt;b&gt;2&lt;/b&gt;</details>" in text
    assert "<summary>thinking, 14 characters</summary>no opening tag</details>" in text
    assert "<summary>thinking, 55 characters, never closed</summary>never closed x" in text
    assert '<b class="box">7&lt;script&gt;</b>' in text
    assert "forced: 25% inserted" in text
    assert "4 times · right · 8 tokens" in text
    assert "trained on</span>" in text
    assert "very hard</span>" in text
    assert "no gradient</span>" in text
    assert text.count("not judged</span>") == 1
    ones = json.loads(rollout_file(run_folder, 1).read_text(encoding="utf-8").splitlines()[0])["answers"]
    for answer in ones:
        assert answer["advantage"] is None or f">{answer['advantage']:+.2f}</span>" in text
    assert report["missing_media"] == 1
    assert text.count("data:image/jpeg;base64,") == 1 + 6
    assert text.count('<div class="gone">') == 3
    assert ">missing</div>" in text
    assert "does not decode" in text
    assert "pages load nothing" in text


def test_counts_of_a_domain(run_folder: Path) -> None:
    files = RolloutFiles(find_rollouts(run_folder))
    math = files.totals["math"]
    assert (math.groups, math.judged_groups, math.degenerate, math.trained) == (5, 4, 2, 2)
    assert (math.answers, math.judged, math.right, math.forced) == (18, 15, 7, 3)
    assert math.reward == 7
    assert math.by_step == {1: [6, 11], 2: [1, 2], 12: [0, 2]}
    assert files.totals["<i>grounding"].reward == 2.5
    assert [path.name for path in find_rollouts(run_folder)] == [f"step_{step:08d}.jsonl" for step in (1, 2, 12)]
    assert find_rollouts(run_folder) == find_rollouts(run_folder / "rollouts")
    assert files.bad == 2
    assert "step_00000012.jsonl, line 2: no key answers" in files.named[0]


def test_the_browser_filters_and_no_script_of_a_model_runs(run_folder: Path, chromium: str, tmp_path: Path) -> None:
    """In Chromium, with the page's policy on and, so that escaping is tested alone, off."""
    page = tmp_path / "page.html"
    write(run_folder, page)
    dom = browse(chromium, page, "--dump-dom")
    assert "<title>rl&lt;b&gt;</title>" in dom
    assert dom.count("<section") == 6
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    probe = """<script>
      const found = [];
      function pick(values) {
        bar.reset();
        for (const [name, value] of Object.entries(values)) bar.elements[name].value = value;
        apply();
        found.push([...list.querySelectorAll("section:not([hidden])")].map((at) => Number(at.dataset.number)));
      }
      pick({}); pick({kind: "useful"}); pick({kind: "degenerate"}); pick({chosen: "0"}); pick({domain: "0"});
      pick({first: "2"}); pick({low: "0.5", order: "-reward"}); pick({text: "NEVER closed"}); pick({order: "-step"});
      pick({text: "nothing has this"});
      document.body.dataset.probe = JSON.stringify([found, document.title, !none.hidden,
        document.querySelector(".answers .answer:nth-child(5) .text").textContent]);
    </script></body>"""
    (tmp_path / "probe.html").write_text(open_page.replace("</body></html>", probe + "</html>"), encoding="utf-8")
    shown = re.search(r'data-probe="([^"]*)"', browse(chromium, tmp_path / "probe.html", "--dump-dom"))
    assert shown
    found, title, is_empty, text = json.loads(html.unescape(shown[1]))
    assert found == [[0, 1, 2, 3, 4, 5], [0, 2, 4], [1, 5], [1, 3, 5], [2], [4, 5], [1, 2, 4], [0], [5, 4, 0, 1, 2, 3], []]
    assert (title, is_empty) == ("rl<b>", True)
    assert text.startswith("safeU+202Etxt.exeU+200BU+0000U+D800 U+2028end")
    forced = open_page.replace("</body></html>", "<script>document.title = 'ran'</script></body></html>")
    (tmp_path / "forced.html").write_text(forced, encoding="utf-8")
    assert "<title>ran</title>" in browse(chromium, tmp_path / "forced.html", "--dump-dom")
    held = page.read_text(encoding="utf-8").replace("</body></html>", "<script>document.title = 'ran'</script></body></html>")
    (tmp_path / "held.html").write_text(held, encoding="utf-8")
    assert "<title>rl&lt;b&gt;</title>" in browse(chromium, tmp_path / "held.html", "--dump-dom"), (
        "the policy lets a script run"
    )


def test_a_screenshot_has_all_parts(run_folder: Path, chromium: str, tmp_path: Path) -> None:
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    write(run_folder, page)
    browse(chromium, page, f"--screenshot={shot}", "--window-size=1300,1800")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for name, colour in {"right": (34, 150, 83), "wrong": (180, 35, 24), "partial": (217, 119, 6), "box": (201, 219, 251),
                         "hidden character": (253, 236, 234), "paper": (255, 255, 255)}.items():  # fmt: skip
        assert (np.abs(pixels.astype(int) - colour) <= 6).all(axis=1).sum() > 60, name


def test_only_what_is_shown_is_kept(tmp_path: Path) -> None:
    """A file of 40 MB, of which four groups are shown: neither memory nor page follow the file's size."""
    long = "step by step " * 40_000
    [line] = save(tmp_path, 1, [group("long", [long, long + "."], [0, 1])], {0}).read_bytes().splitlines(keepends=True)
    path = rollout_file(tmp_path, 1)
    path.write_bytes(line * 40)
    assert path.stat().st_size > 40e6
    tracemalloc.start()
    report = inspect_rollouts.inspect_rollouts([path], tmp_path / "page.html", title="long", count=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (report["groups"], report["shown"]) == (40, 4)
    assert peak < 8 * len(line)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(text) < 4 * 2 * 1.1 * untrusted_text.MAX_TEXT + 40_000
    assert "504,000 characters left out" in text


def test_the_command_line(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "deep" / "page.html"
    command = ["inspect", str(run_folder), "--out", str(page)]
    assert cli.main([*command, "--rows", "0,4-5"]) == 0
    assert json.loads(capsys.readouterr().out)["shown"] == 3
    assert cli.main([*command[:1], str(rollout_file(run_folder, 2)), *command[2:], "--strict"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == 1
    for extra, words in [
        (["--strict"], "2 lines hold no group"), (["--rows", "6"], "has groups 0 to 5"), (["--rows", "x"], "not of the form"),
        (["--iterations", "99"], "that was asked for"), (["--domain", "geo"], "that was asked for"),
    ]:  # fmt: skip
        assert cli.main([*command, *extra]) == 1
        assert words in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "a", "messages": []}\n')
    assert cli.main(["inspect", str(other), "--out", str(page)]) == 1
    assert "other.jsonl, line 1: no key answers" in capsys.readouterr().err
    assert cli.main(["inspect", str(run_folder.parent / "one.jpg"), "--out", str(page)]) == 1
    assert "neither a folder of" in capsys.readouterr().err


GOOD = {"step": 1, "domain": "math", "answers": [{"text": "7", "reward": 1, "correct": True}]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (json.dumps([]), "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        (json.dumps(GOOD | {"step": -1}), "the key step holds no int"),
        (json.dumps(GOOD | {"answers": [7]}), "an answer is not a JSON object"),
        (json.dumps(GOOD | {"answers": [{"text": "7", "reward": "1"}]}), "the key reward holds no number"),
        (json.dumps(GOOD | {"answers": [{"text": "7", "reward": float("nan")}]}), "the key reward holds no number"),
        (json.dumps(GOOD | {"answers": [{"text": None}]}), "the key text holds no str"),
    ],
)
def test_a_line_that_holds_no_group_says_why(line: str, words: str) -> None:
    parse_group(json.dumps(GOOD).encode())
    with pytest.raises(BadGroup, match=words):
        parse_group(line.encode())
