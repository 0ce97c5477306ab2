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
  subtree,
  titleOf,
  withNode,
  without,
  withoutTurn,
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

test("removing a turn keeps what follows it", () => {
  const { conversation, ids } = sample();
  const rest = withoutTurn(conversation, ids[0]!);
  expect(contents(rest)).toEqual(["q2", "a3"]);
  expect(rest.nodes).toHaveLength(2);
  expect(contents(withoutTurn(conversation, ids[3]!))).toEqual(["q1", "a2"]);
  expect(withoutTurn(rest, ids[3]!)).toMatchObject({ nodes: [], selected: null });
});

test("branches below the answers of a removed turn become versions", () => {
  const { conversation, ids } = sample();
  const other = newNode(ids[1]!, "user", "q3");
  const rest = withoutTurn(withNode(conversation, other), ids[0]!);
  expect(contents(rest)).toEqual(["q3"]);
  expect(siblings(rest, rest.nodes.find(({ id }) => id === other.id)!).map(({ content }) => content)).toEqual(["q2", "q3"]);
});

test("answers below a removed turn no longer say what was left out", () => {
  const { conversation, ids } = sample();
  const counted = updateNode(updateNode(conversation, ids[4]!, { left_out: 2 }), ids[2]!, { left_out: 0 });
  expect(withoutTurn(counted, ids[0]!).nodes.map((node) => node.left_out)).toEqual([null, null]);
  expect(withoutTurn(counted, ids[3]!).nodes.map((node) => node.left_out)).toEqual([null, null, 0]);
});

test("a subtree does not depend on the order of the messages", () => {
  const { conversation, ids } = sample();
  const reversed = { ...conversation, nodes: conversation.nodes.toReversed() };
  expect([...subtree(reversed, ids[2]!)].sort()).toEqual([ids[2], ids[3], ids[4]].sort());
});

test("messages deleted in either window stay deleted", () => {
  const { conversation, ids } = sample();
  const stored = withBase(conversation);
  const added = newNode(ids[4]!, "user", "q4");
  const ours = withoutTurn(stored, ids[0]!);
  const theirs = withBase(withNode(conversation, added));
  for (const merged of [merge(ours, theirs), merge(withNode(stored, added), withBase(ours))]) {
    expect(contents({ ...merged, selected: added.id })).toEqual(["q2", "a3", "q4"]);
    expect(merged.nodes).toHaveLength(3);
  }
  expect(contents(merge(stored, withBase(without(conversation, ids[2]!))))).toEqual(["q1", "a1"]);
});

test("a deleted message remains if the other window has continued it", () => {
  const { conversation, ids } = sample();
  const stored = withBase(conversation);
  const added = newNode(ids[0]!, "assistant", "a4");
  const merged = merge(withoutTurn(stored, ids[0]!), withBase(withNode(conversation, added)));
  expect(contents({ ...merged, selected: added.id })).toEqual(["q1", "a4"]);
  expect(contents({ ...merged, selected: ids[4]! })).toEqual(["q2", "a3"]);
  expect(merged.nodes).toHaveLength(4);
});
