"""The table of answers, and the questions that it asks: never among the prompts that are learned from."""

from __future__ import annotations

from engine.refactor.compare_answers import QUESTIONS_PATH, repeats_itself, table
from engine.refactor.demo import PROMPTS_PATH


def test_no_question_is_a_prompt_that_is_learned_from():
    questions = QUESTIONS_PATH.read_text(encoding="utf-8").splitlines()
    prompts = PROMPTS_PATH.read_text(encoding="utf-8").splitlines()
    assert len(set(questions)) == 50
    assert not {q.lower() for q in questions} & {p.lower() for p in prompts}


def test_a_loop_is_words_in_a_row_that_come_again_and_again():
    assert repeats_itself("It is the largest city in the world. " * 3)
    assert not repeats_itself("It is the largest city in the world. " * 2)
    assert not repeats_itself(" ".join(str(i) for i in range(100)))


def test_the_table_keeps_answers_in_their_cells():
    lines = table(["a|b?"], ["one\ntwo"], ["x y z u v w " * 3]).splitlines()
    assert lines[2] == "| a\\|b? | one<br>two | " + "x y z u v w " * 3 + " | refactored |"
