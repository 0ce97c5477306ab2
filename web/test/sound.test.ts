import { expect, test } from "vitest";
import { sound } from "../src/sound";
import { newConversation, newNode, withNode } from "../src/tree";

const question = newNode(null, "user", "q");
const answer = newNode(question.id, "assistant", "a");
const good = [question, answer].reduce(withNode, newConversation());

test("a conversation of this page stays as it is", () => {
  expect(sound(good)).toEqual(good);
  expect(sound({ ...good, updated: 5 })).toEqual({ ...good, updated: 5 });
});

test("what is no conversation is refused", () => {
  const circle = [{ ...question, parent: answer.id }, answer];
  for (const nodes of [[null], [{}], [{ ...question, content: 1 }], [question, question], [answer], circle]) {
    expect(() => sound({ ...good, nodes })).toThrow(SyntaxError);
  }
  for (const each of [null, 1, [], {}, { id: "x" }]) expect(() => sound(each)).toThrow(SyntaxError);
});

test("parts of another form are left out", () => {
  const hit = {
    number: 1, doc: "d", hash: "h", start: 0, end: 1, page: null, headings: [], text: "t", score: 1,
    legs: { lexical: { rank: 1, score: 1 } },
  }; // prettier-ignore
  const odd = { query: "q", found: true, hits: [hit, {}, { ...hit, legs: null }], prompt: 5 };
  const nodes = [question, { ...answer, retrieval: odd, citations: [{}, hit], reasoning: 1 }];
  const found = sound({ ...good, nodes, settings: { stop: "x", top_p: "y", seed: 3, messages: [] } });
  expect(found.settings).toEqual({ seed: 3 });
  expect(found.nodes[1]).toMatchObject({ citations: [hit], reasoning: null });
  expect(found.nodes[1]!.retrieval).toMatchObject({ hits: [hit], prompt: null, left_out: 0 });
  expect(sound({ ...good, nodes: [question, { ...answer, retrieval: {} }] }).nodes[1]!.retrieval).toBeNull();
  expect(sound({ ...good, selected: "gone" }).selected).toBe(answer.id);
});
