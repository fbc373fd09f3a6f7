"""The linter of answers: a table of texts and what is wrong with them."""

from __future__ import annotations

import pytest

from megatron_glmv.data.format import AnswerFormat, AnswerParts, check_answer, split_answer

TAGGED = AnswerFormat()
BOXED = AnswerFormat(box="one")
BARE = AnswerFormat(answer_tags=False)
NO_THINKING = AnswerFormat(think="empty", answer_tags=False)
PLAIN = AnswerFormat(think="none", answer_tags=False, box="none")
BOX = "<|begin_of_box|>4<|end_of_box|>"
GOOD = f"<think>2 + 2</think><answer>It is {BOX}.</answer>"


@pytest.mark.parametrize(
    ("text", "form", "faults"),
    [
        (GOOD, TAGGED, []),
        (GOOD, BOXED, []),
        ("<think>\na\n</think>\n\n<answer>\nb\n</answer>\n", TAGGED, []),
        (f"\n<think>a</think>\nIt is {BOX}.", BARE, []),
        ("<think>a</think>b", AnswerFormat("any", answer_tags=False), []),
        ("b", AnswerFormat("any", answer_tags=False), []),
        ("\n<think></think>\nb", NO_THINKING, []),
        ("4", PLAIN, []),
        ("", PLAIN, ["answer_empty"]),
        ("", TAGGED, ["think_missing", "answer_missing"]),
        ("<answer>b</answer>", TAGGED, ["think_missing"]),
        ("<think>a</think>b", TAGGED, ["answer_missing"]),
        ("<think>a<answer>b</answer>", TAGGED, ["think_unclosed"]),
        ("a</think><answer>b</answer>", TAGGED, ["think_unclosed"]),
        ("<think>a</think><answer>b", TAGGED, ["answer_unclosed"]),
        ("<think>a</think><think>c</think><answer>b</answer>", TAGGED, ["think_repeated"]),
        ("<think>a<think>c</think></think><answer>b</answer>", TAGGED, ["think_repeated"]),
        ("<think>a</think><answer>b</answer><answer>c</answer>", TAGGED, ["answer_repeated"]),
        ("<think> \n</think><answer>b</answer>", TAGGED, ["think_empty"]),
        ("<think>a</think><answer> </answer>", TAGGED, ["answer_empty"]),
        ("<think>a</think>", BARE, ["answer_empty"]),
        ("<think>a</think><answer>b</answer>", BARE, ["answer_forbidden"]),
        ("<think>a</think>b", NO_THINKING, ["think_forbidden"]),
        ("<think></think>4", PLAIN, ["think_forbidden"]),
        ("<answer>b</answer><think>a</think>", TAGGED, ["tags_out_of_order"]),
        ("<think>a<answer>b</answer></think>", TAGGED, ["tags_out_of_order"]),
        ("<think>a<answer>b</think></answer>", TAGGED, ["tags_out_of_order"]),
        ("</think>a<think><answer>b</answer>", TAGGED, ["tags_out_of_order"]),
        ("Well. <think>a</think><answer>b</answer>", TAGGED, ["text_outside"]),
        ("<think>a</think> so <answer>b</answer>", TAGGED, ["text_outside"]),
        ("<think>a</think><answer>b</answer> done", TAGGED, ["text_outside"]),
        ("Well. <think>a</think>b", BARE, ["text_outside"]),
        ("<think>a</think><answer>4</answer>", BOXED, ["box_missing"]),
        (f"<think>a</think><answer>{BOX} or {BOX}</answer>", BOXED, ["box_repeated"]),
        (f"<think>a</think><answer>{BOX} or {BOX}</answer>", TAGGED, ["box_repeated"]),
        (f"<think>{BOX}</think><answer>{BOX}</answer>", BOXED, ["box_repeated"]),
        (f"<think>{BOX}</think><answer>4</answer>", BOXED, ["box_outside_answer"]),
        (f"<think>{BOX}</think>4", BARE, ["box_outside_answer"]),
        ("<think><|begin_of_box|></think><answer>4<|end_of_box|></answer>", BOXED, ["box_outside_answer"]),
        ("<think>a</think><answer><|begin_of_box|>4</answer>", BOXED, ["box_unclosed"]),
        ("<think>a</think><answer>4<|end_of_box|></answer>", TAGGED, ["box_unclosed"]),
        ("<think>a</think><answer><|end_of_box|>4<|begin_of_box|></answer>", BOXED, ["tags_out_of_order"]),
        ("<think>a</think><answer><|begin_of_box|> <|end_of_box|></answer>", BOXED, ["box_empty"]),
        (BOX, PLAIN, ["box_forbidden"]),
        (r"<think>a</think><answer>\boxed{4}</answer>", TAGGED, ["latex_box"]),
        (r"<think>a</think><answer>\boxed {4}", BOXED, ["answer_unclosed", "box_missing", "latex_box"]),
    ],
)  # fmt: skip
def test_faults_of_answers(text, form, faults):
    assert check_answer(text, form) == faults


@pytest.mark.parametrize(
    ("text", "answer_tags", "parts"),
    [
        (GOOD, True, AnswerParts("2 + 2", f"It is {BOX}.", "4")),
        ("<think>a</think>b", False, AnswerParts("a", "b", None)),
        ("<think>a</think>b", True, AnswerParts("a", None, None)),
        ("b", False, AnswerParts(None, "b", None)),
        (f"<think>a</think>{BOX}{BOX}", False, AnswerParts("a", BOX + BOX, None)),
        (f"<think>{BOX}</think>b", False, AnswerParts(BOX, "b", None)),
        ("<think>a<answer>b</answer>", True, AnswerParts(None, "b", None)),
    ],
)
def test_parts_of_answers(text, answer_tags, parts):
    assert split_answer(text, answer_tags) == parts
