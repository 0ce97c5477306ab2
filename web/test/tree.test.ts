import { expect, test } from "vitest";
import {
  withBase,
  updateNode,
  leafBelow,
  merge,
  newConversation,
  newNode,
  path,
  siblings,
  titleOf,
  withNode,
  without,
  type Conversation,
} from "../src/tree";

/** question -> two answers, the second with a question and an answer below it */
function sample(): { conversation: Conversation; ids: string[] } {
  const question = newNode(null, "user", "q1");
  const first = newNode(question.id, "assistant", "a1");
  const second = newNode(question.id, "assistant", "a2");
  const next = newNode(second.id, "user", "q2");
  const last = newNode(next.id, "assistant", "a3");
  const nodes = [question, first, second, next, last];
  const conversation = nodes.reduce(withNode, newConversation());
  return { conversation, ids: nodes.map((node) => node.id) };
}

const contents = (conversation: Conversation) => path(conversation).map((node) => node.content);

test("the path leads from the root to the selected message", () => {
  const { conversation, ids } = sample();
  expect(contents(conversation)).toEqual(["q1", "a2", "q2", "a3"]);
  expect(contents({ ...conversation, selected: ids[1]! })).toEqual(["q1", "a1"]);
  expect(contents({ ...conversation, selected: null })).toEqual([]);
});

test("a missing parent or a cycle ends the path", () => {
  const { conversation, ids } = sample();
  expect(contents({ ...conversation, selected: "gone" })).toEqual([]);
  const cycle = updateNode(conversation, ids[0]!, { parent: ids[4]! });
  expect(contents(cycle)).toHaveLength(4);
});

test("versions are siblings, and selecting one shows its newest leaf", () => {
  const { conversation, ids } = sample();
  const [, first, second] = conversation.nodes;
  expect(siblings(conversation, first!)).toEqual([first, second]);
  expect(leafBelow(conversation, ids[2]!)).toBe(ids[4]);
  expect(leafBelow(conversation, ids[1]!)).toBe(ids[1]);
});

test("removing a message removes its descendants", () => {
  const { conversation, ids } = sample();
  const rest = without(conversation, ids[2]!);
  expect(rest.nodes.map((node) => node.content)).toEqual(["q1", "a1"]);
  expect(contents(rest)).toEqual(["q1", "a1"]);
  expect(contents(without(rest, ids[1]!))).toEqual(["q1"]);
  expect(without(conversation, ids[1]!).selected).toBe(ids[4]);
});

test("a title is one line of at most forty whole characters", () => {
  expect(titleOf("  one\ntwo")).toBe("one");
  expect([...titleOf("🌊".repeat(60))]).toHaveLength(41);
});

test("merging keeps the messages of both windows", () => {
  const { conversation: original, ids } = sample();
  const conversation = withBase(original);
  const here = withNode(conversation, { ...conversation.nodes[0]!, id: "here", parent: ids[4]! });
  const there = { ...withNode(conversation, { ...conversation.nodes[0]!, id: "there" }), revision: 7 };
  const done = updateNode(here, ids[4]!, { content: "longer" });
  const both = merge(done, { ...there, title: "theirs" });
  expect(both.nodes.map((node) => node.id)).toEqual([...ids, "there", "here"]);
  expect(both.nodes.find((node) => node.id === ids[4])?.content).toBe("longer");
  expect([both.selected, both.revision, both.title]).toEqual(["here", 7, "theirs"]);
});

test("merging keeps the more complete state of an answer", () => {
  const { conversation, ids } = sample();
  const early = updateNode(conversation, ids[4]!, { content: "", finish_reason: null });
  const late = updateNode(conversation, ids[4]!, { content: "all of it", finish_reason: "stop" });
  const partial = updateNode(conversation, ids[4]!, { content: "all of", finish_reason: null });
  const of = (ours: Conversation, theirs: Conversation) =>
    merge(ours, theirs).nodes.find((node) => node.id === ids[4])?.content;
  expect([of(early, late), of(late, early)]).toEqual(["all of it", "all of it"]);
  expect([of(early, partial), of(partial, early)]).toEqual(["all of", "all of"]);
  expect(of(partial, late)).toBe("all of it");
});

test("merging keeps the changes of both windows, and ours on a conflict", () => {
  const start = withBase({ ...sample().conversation, title: "t", system: null });
  const theirs = { ...start, title: "theirs", system: "theirs", revision: 2 };
  const ours = { ...start, system: "ours", knowledge_base: "b" };
  const both = merge(ours, theirs);
  expect(both).toMatchObject({ title: "theirs", system: "ours", knowledge_base: "b", revision: 2 });
  // Later changes are relative to their title.
  expect(merge({ ...both, title: "x" }, theirs).title).toBe("x");
  expect(merge(both, { ...theirs, title: "later" }).title).toBe("later");
});
