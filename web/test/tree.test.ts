import { expect, test } from "vitest";
import {
  based,
  changed,
  leafBelow,
  merged,
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
function grown(): { conversation: Conversation; ids: string[] } {
  const question = newNode(null, "user", "q1");
  const first = newNode(question.id, "assistant", "a1");
  const second = newNode(question.id, "assistant", "a2");
  const next = newNode(second.id, "user", "q2");
  const last = newNode(next.id, "assistant", "a3");
  const nodes = [question, first, second, next, last];
  const conversation = nodes.reduce(withNode, newConversation());
  return { conversation, ids: nodes.map((node) => node.id) };
}

const said = (conversation: Conversation) => path(conversation).map((node) => node.content);

test("the path leads from the first message to the one selected", () => {
  const { conversation, ids } = grown();
  expect(said(conversation)).toEqual(["q1", "a2", "q2", "a3"]);
  expect(said({ ...conversation, selected: ids[1]! })).toEqual(["q1", "a1"]);
  expect(said({ ...conversation, selected: null })).toEqual([]);
});

test("a selection that is broken ends the path and hangs nothing", () => {
  const { conversation, ids } = grown();
  expect(said({ ...conversation, selected: "gone" })).toEqual([]);
  const circle = changed(conversation, ids[0]!, { parent: ids[4]! });
  expect(said(circle)).toHaveLength(4);
});

test("versions are siblings, and choosing one shows its newest end", () => {
  const { conversation, ids } = grown();
  const [, first, second] = conversation.nodes;
  expect(siblings(conversation, first!)).toEqual([first, second]);
  expect(leafBelow(conversation, ids[2]!)).toBe(ids[4]);
  expect(leafBelow(conversation, ids[1]!)).toBe(ids[1]);
});

test("what is taken away takes what is below it along", () => {
  const { conversation, ids } = grown();
  const left = without(conversation, ids[2]!);
  expect(left.nodes.map((node) => node.content)).toEqual(["q1", "a1"]);
  expect(said(left)).toEqual(["q1", "a1"]);
  expect(said(without(left, ids[1]!))).toEqual(["q1"]);
  expect(without(conversation, ids[1]!).selected).toBe(ids[4]);
});

test("a title is a line of at most forty letters, whole ones", () => {
  expect(titleOf("  one\ntwo")).toBe("one");
  expect([...titleOf("🌊".repeat(60))]).toHaveLength(41);
});

test("what two windows made of a conversation is all kept", () => {
  const { conversation: grew, ids } = grown();
  const conversation = based(grew);
  const here = withNode(conversation, { ...conversation.nodes[0]!, id: "here", parent: ids[4]! });
  const there = { ...withNode(conversation, { ...conversation.nodes[0]!, id: "there" }), revision: 7 };
  const done = changed(here, ids[4]!, { content: "longer" });
  const both = merged(done, { ...there, title: "theirs" });
  expect(both.nodes.map((node) => node.id)).toEqual([...ids, "there", "here"]);
  expect(both.nodes.find((node) => node.id === ids[4])?.content).toBe("longer");
  expect([both.selected, both.revision, both.title]).toEqual(["here", 7, "theirs"]);
});

test("an answer that has gone on elsewhere is not set back to what it was", () => {
  const { conversation, ids } = grown();
  const early = changed(conversation, ids[4]!, { content: "", finish_reason: null });
  const late = changed(conversation, ids[4]!, { content: "all of it", finish_reason: "stop" });
  const amid = changed(conversation, ids[4]!, { content: "all of", finish_reason: null });
  const of = (ours: Conversation, theirs: Conversation) =>
    merged(ours, theirs).nodes.find((node) => node.id === ids[4])?.content;
  expect([of(early, late), of(late, early)]).toEqual(["all of it", "all of it"]);
  expect([of(early, amid), of(amid, early)]).toEqual(["all of", "all of"]);
  expect(of(amid, late)).toBe("all of it");
});

test("what each of two windows changed is kept, and ours where both changed the same", () => {
  const begun = based({ ...grown().conversation, title: "t", system: null });
  const theirs = { ...begun, title: "theirs", system: "theirs", revision: 2 };
  const ours = { ...begun, system: "ours", knowledge_base: "b" };
  const both = merged(ours, theirs);
  expect(both).toMatchObject({ title: "theirs", system: "ours", knowledge_base: "b", revision: 2 });
  // From now on it is their title that would be changed.
  expect(merged({ ...both, title: "x" }, theirs).title).toBe("x");
  expect(merged(both, { ...theirs, title: "later" }).title).toBe("later");
});
