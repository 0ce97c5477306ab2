import { expect, test } from "vitest";
import { validateConversation } from "../src/validateConversation";
import { newConversation, newNode, withNode } from "../src/tree";

const question = newNode(null, "user", "q");
const answer = newNode(question.id, "assistant", "a");
const good = [question, answer].reduce(withNode, newConversation());

test("a valid conversation is unchanged", () => {
  expect(validateConversation(good)).toEqual(good);
  expect(validateConversation({ ...good, updated: 5 })).toEqual({ ...good, updated: 5 });
});

test("invalid conversations are refused", () => {
  const cycle = [{ ...question, parent: answer.id }, answer];
  for (const nodes of [[null], [{}], [{ ...question, content: 1 }], [question, question], [answer], cycle]) {
    expect(() => validateConversation({ ...good, nodes })).toThrow(SyntaxError);
  }
  for (const each of [null, 1, [], {}, { id: "x" }]) expect(() => validateConversation(each)).toThrow(SyntaxError);
});

test("malformed optional parts are dropped", () => {
  const hit = {
    number: 1, doc: "d", hash: "h", start: 0, end: 1, page: null, headings: [], text: "t", score: 1,
    legs: { lexical: { rank: 1, score: 1 } },
  }; // prettier-ignore
  const malformed = { query: "q", found: true, hits: [hit, {}, { ...hit, legs: null }], prompt: 5 };
  const nodes = [question, { ...answer, retrieval: malformed, citations: [{}, hit], reasoning: 1, left_out: -1 }];
  const result = validateConversation({ ...good, nodes, settings: { stop: "x", top_p: "y", seed: 3, messages: [] } });
  expect(result.settings).toEqual({ seed: 3 });
  expect(result.nodes[1]).toMatchObject({ citations: [hit], reasoning: null, left_out: null });
  expect(result.nodes[1]!.retrieval).toMatchObject({ hits: [hit], prompt: null, left_out: 0 });
  expect(validateConversation({ ...good, nodes: [question, { ...answer, retrieval: {} }] }).nodes[1]!.retrieval).toBeNull();
  expect(validateConversation({ ...good, selected: "gone" }).selected).toBe(answer.id);
});
