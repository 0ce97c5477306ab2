import { expect, test } from "vitest";
import {
  add, isComplete, move, rankOf, promptsOf, put, toggleTie, without, type Ranking,
} from "../src/preferences/ranking"; // prettier-ignore

test("answers are ranked in turn, and the last one automatically", () => {
  let ranking: Ranking = add([], 2, 4);
  expect(ranking).toEqual([[2]]);
  expect(add(ranking, 2, 4)).toBe(ranking);
  ranking = add(ranking, 0, 4, true);
  expect(ranking).toEqual([[2, 0]]);
  expect(isComplete(ranking, 4)).toBe(false);
  ranking = add(ranking, 3, 4);
  expect(ranking).toEqual([[2, 0], [3], [1]]);
  expect(isComplete(ranking, 4)).toBe(true);
  expect([0, 1, 2, 3].map((i) => rankOf(ranking, i))).toEqual([1, 4, 1, 3]);
  expect(add([], 1, 2)).toEqual([[1], [0]]);
  expect(add([], 1, 2, true)).toEqual([[1], [0]]); // no answer to tie with
});

test("a ranking with all answers tied is incomplete", () => {
  expect(isComplete([[0, 1]], 2)).toBe(false);
  expect(rankOf([[0]], 1)).toBeNull();
});

test("ties are added and removed", () => {
  expect(toggleTie([[0], [1], [2]], 1)).toEqual([[0], [1, 2]]);
  expect(toggleTie([[0], [1, 2]], 1)).toEqual([[0], [1], [2]]);
  expect(toggleTie([[0, 3], [1, 2]], 1)).toEqual([[0, 3, 1, 2]]);
  expect(toggleTie([[0], [1]], 1)).toEqual([[0], [1]]); // no answer after the last
});

test("answers are dragged and moved", () => {
  expect(put([[0], [1, 2]], 2, 0)).toEqual([[2], [0], [1]]);
  expect(put([[0], [1]], 2, null)).toEqual([[0], [1], [2]]);
  expect(put([[0], [1]], 0, 0)).toEqual([[0], [1]]);
  expect(move([[0], [1], [2]], 2, -1)).toEqual([[0], [2], [1]]);
  expect(move([[0], [1], [2]], 0, 1)).toEqual([[1], [0], [2]]);
  expect(move([[0], [1]], 1, 1)).toEqual([[0], [1]]);
  expect(move([[0], [1]], 0, -1)).toEqual([[0], [1]]);
  expect(without([[0], [1, 2]], 0)).toEqual([[1, 2]]);
});

test("prompts are read from files of every layout", () => {
  expect(promptsOf("你是谁？\r\n\n  \nWho?\n")).toEqual(["你是谁？", "Who?"]);
  const lines = [
    { prompt: "a" },
    { prompt: [{ role: "system", content: "s" }, { role: "user", content: "b" }] },
    { messages: [{ role: "user", content: "c" }, { role: "assistant", content: "x" }] },
    { instruction: "d" },
    { other: 1 },
  ];
  expect(promptsOf(lines.map((each) => JSON.stringify(each)).join("\n"))).toEqual([..."abcd"]);
  expect(promptsOf(JSON.stringify([...lines, "e", 5, null]))).toEqual([..."abcde"]);
  expect(promptsOf('{"prompt": "one"}')).toEqual(["one"]);
  expect(promptsOf("42\n{broken")).toEqual(["42", "{broken"]);
});
