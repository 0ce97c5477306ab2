/** A conversation is a tree: editing a message or regenerating an answer adds a sibling. */

import type { Citation, Retrieval } from "./api";
import { uuid } from "./platform";

export interface Node {
  id: string;
  parent: string | null;
  role: "user" | "assistant";
  content: string;
  reasoning: string | null;
  citations: Citation[] | null;
  retrieval: Retrieval | null;
  /** Of an answer: the oldest messages before it, which the model did not see. */
  left_out: number | null;
  /** Of an answer: the sampling that was in force; answers saved earlier lack it. */
  sampling?: Record<string, number | boolean> | null;
  model: string | null;
  finish_reason: string | null;
  created: number;
}

export interface Settings {
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  repetition_penalty?: number;
  max_tokens?: number;
  seed?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  stop?: string[];
  thinking?: boolean;
  thinking_budget?: number;
}

/** The fields of a conversation beside its messages. */
export interface Metadata {
  title: string;
  system: string | null;
  settings: Settings;
  knowledge_base: string | null;
}

export interface Conversation extends Metadata {
  id: string;
  nodes: Node[];
  selected: string | null;
  revision?: number;
  /** What `revision` stores: differences from it are changes of this window. */
  base?: Base;
}

interface Base extends Metadata {
  parents: ReadonlyMap<string, string | null>; // of each message
}

/** Record what is stored as the base that later changes of this window are compared with. */
export function withBase(stored: Conversation): Conversation {
  const { title, system, settings, knowledge_base } = stored;
  const parents = new Map(stored.nodes.map(({ id, parent }) => [id, parent]));
  return { ...stored, base: { title, system, settings, knowledge_base, parents } };
}

export function newConversation(): Conversation {
  return {
    id: uuid(),
    title: "",
    system: null,
    settings: {},
    knowledge_base: null,
    nodes: [],
    selected: null,
  };
}

export function newNode(
  parent: string | null,
  role: Node["role"],
  content: string,
  model: string | null = null,
): Node {
  return {
    id: uuid(),
    parent,
    role,
    content,
    reasoning: null,
    citations: null,
    retrieval: null,
    left_out: null,
    model,
    finish_reason: null,
    created: Math.floor(Date.now() / 1000),
  };
}

/** Messages from the root to the selected one; ends at a missing parent or a cycle. */
export function path(conversation: Conversation): Node[] {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const nodes: Node[] = [];
  let id = conversation.selected;
  while (id !== null) {
    const node = byId.get(id);
    if (node === undefined || nodes.includes(node)) break;
    nodes.unshift(node);
    id = node.parent;
  }
  return nodes;
}

export function siblings(conversation: Conversation, node: Node): Node[] {
  return conversation.nodes.filter((each) => each.parent === node.parent);
}

/** The newest leaf below a message, or the message itself if it is a leaf. */
export function leafBelow(conversation: Conversation, id: string): string {
  for (;;) {
    const child = conversation.nodes.findLast((node) => node.parent === id);
    if (child === undefined) return id;
    id = child.id;
  }
}

export function withNode(conversation: Conversation, node: Node): Conversation {
  return { ...conversation, nodes: [...conversation.nodes, node], selected: node.id };
}

export function updateNode(
  conversation: Conversation,
  id: string,
  change: Partial<Node>,
): Conversation {
  const nodes = conversation.nodes.map((node) => (node.id === id ? { ...node, ...change } : node));
  return { ...conversation, nodes };
}

/**
 * Merge the states of two windows: the messages that either added without those that either deleted,
 * and the metadata changes of both. This window's change wins a conflict, and its selection is
 * preserved.
 */
export function merge(ours: Conversation, theirs: Conversation): Conversation {
  const { base } = ours;
  const nodes = mergeNodes(ours, theirs);
  const isChanged = (name: keyof Metadata) =>
    JSON.stringify(ours[name]) !== JSON.stringify(base?.[name]);
  const names = (["title", "system", "settings", "knowledge_base"] as const).filter(isChanged);
  const changes = Object.fromEntries(names.map((name) => [name, ours[name]]));
  const exists = nodes.some((node) => node.id === ours.selected);
  const selected = exists ? ours.selected : (nodes.at(-1)?.id ?? null);
  return { ...withBase(theirs), ...changes, nodes, selected };
}

function mergeNodes(ours: Conversation, theirs: Conversation): Node[] {
  const [ourNodes, theirNodes] = [ours, theirs].map(
    ({ nodes }) => new Map(nodes.map((node) => [node.id, node])),
  ) as [Map<string, Node>, Map<string, Node>];
  const parents: Base["parents"] = ours.base?.parents ?? new Map();
  const all = new Map<string, Node>(); // parents before their children, as in both
  for (const id of [...theirNodes.keys(), ...ourNodes.keys()]) {
    const [our, their] = [ourNodes.get(id), theirNodes.get(id)];
    if (!our || !their) all.set(id, (our ?? their)!);
    // Deleting a turn moves what follows it.
    else all.set(id, { ...moreComplete(our, their), parent: parents.get(id) === their.parent ? our.parent : their.parent });
  }
  const kept = new Set<string>();
  for (const id of all.keys()) {
    const isDeleted = parents.has(id) && !(ourNodes.has(id) && theirNodes.has(id));
    if (isDeleted) continue;
    // A deleted message remains if the other window has continued it.
    for (let at: string | null = id; at !== null && !kept.has(at); at = all.get(at)?.parent ?? null) kept.add(at);
  }
  return [...all.values()].filter((node) => kept.has(node.id));
}

/** A message is generated in one window; the other may have an earlier state of it. */
function moreComplete(ours: Node, theirs: Node): Node {
  const [oursFinished, theirsFinished] = [ours, theirs].map((node) => node.finish_reason !== null);
  if (oursFinished !== theirsFinished) return oursFinished ? ours : theirs;
  return textLength(ours) >= textLength(theirs) ? ours : theirs;
}

function textLength(node: Node): number {
  return node.content.length + (node.reasoning?.length ?? 0);
}

export function isEmpty(node: Node): boolean {
  return !node.content && !node.reasoning;
}

/** A message and its descendants. */
export function subtree(conversation: Conversation, id: string): Set<string> {
  const ids = new Set([id]);
  for (let size = 0; size < ids.size; ) {
    size = ids.size; // once more, where a child precedes its parent in the list
    for (const node of conversation.nodes) {
      if (node.parent !== null && ids.has(node.parent)) ids.add(node.id);
    }
  }
  return ids;
}

/** A question and its answers, without what follows them. */
export function turn(conversation: Conversation, question: string): Set<string> {
  const answers = conversation.nodes.filter(
    ({ parent, role }) => parent === question && role === "assistant",
  );
  return new Set([question, ...answers.map(({ id }) => id)]);
}

/** Remove a message and its descendants; the selection moves to a remaining message. */
export function without(conversation: Conversation, id: string): Conversation {
  return removed(conversation, id, subtree(conversation, id), conversation.nodes);
}

/** Remove a question with all its answers; what follows them then follows the message before. */
export function withoutTurn(conversation: Conversation, question: string): Conversation {
  const ids = turn(conversation, question);
  const below = subtree(conversation, question);
  const { parent } = conversation.nodes.find((node) => node.id === question)!;
  const nodes = conversation.nodes.map((node) => {
    if (!below.has(node.id) || ids.has(node.id)) return node;
    // The number of messages left out before it is unknown.
    const moved = { ...node, left_out: null };
    return ids.has(node.parent!) ? { ...moved, parent } : moved;
  });
  return removed(conversation, question, ids, nodes);
}

function removed(before: Conversation, id: string, ids: Set<string>, all: Node[]): Conversation {
  const parent = before.nodes.find((node) => node.id === id)?.parent ?? null;
  const nodes = all.filter((node) => !ids.has(node.id));
  const rest = { ...before, nodes };
  if (before.selected === null || !ids.has(before.selected)) return rest;
  const sibling = nodes.findLast((node) => node.parent === parent);
  return { ...rest, selected: sibling ? leafBelow(rest, sibling.id) : parent };
}

export function titleOf(text: string): string {
  const line = text.trim().split("\n")[0] ?? "";
  const characters = [...line];
  return characters.length > 40 ? `${characters.slice(0, 40).join("")}…` : line;
}
