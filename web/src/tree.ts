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
  model: string | null;
  finish_reason: string | null;
  created: number;
}

export interface Settings {
  temperature?: number;
  top_p?: number;
  max_tokens?: number;
  seed?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  stop?: string[];
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
  /** The metadata of `revision`: differences from it are changes of this window. */
  base?: Metadata;
}

/** Record the stored metadata as the base that later changes of this window are compared with. */
export function withBase(stored: Conversation): Conversation {
  const { title, system, settings, knowledge_base } = stored;
  return { ...stored, base: { title, system, settings, knowledge_base } };
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
 * Merge the states of two windows: the messages of both and the metadata changes of both. This
 * window's change wins a conflict, and its selection is preserved.
 */
export function merge(ours: Conversation, theirs: Conversation): Conversation {
  const ourNodes = new Map(ours.nodes.map((node) => [node.id, node]));
  const theirIds = new Set(theirs.nodes.map((node) => node.id));
  const nodes = theirs.nodes.map((node) => moreComplete(ourNodes.get(node.id) ?? node, node));
  nodes.push(...ours.nodes.filter((node) => !theirIds.has(node.id)));
  const { base } = ours;
  const isChanged = (name: keyof Metadata) =>
    JSON.stringify(ours[name]) !== JSON.stringify(base?.[name]);
  const names = (["title", "system", "settings", "knowledge_base"] as const).filter(isChanged);
  const changes = Object.fromEntries(names.map((name) => [name, ours[name]]));
  return { ...withBase(theirs), ...changes, nodes, selected: ours.selected };
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

/** Remove a message and its descendants; the selection moves to a remaining message. */
export function without(conversation: Conversation, id: string): Conversation {
  const removed = new Set([id]);
  // Children follow their parents in the list.
  for (const node of conversation.nodes) {
    if (node.parent !== null && removed.has(node.parent)) removed.add(node.id);
  }
  const parent = conversation.nodes.find((node) => node.id === id)?.parent ?? null;
  const nodes = conversation.nodes.filter((node) => !removed.has(node.id));
  const rest = { ...conversation, nodes };
  if (conversation.selected === null || !removed.has(conversation.selected)) return rest;
  const sibling = nodes.findLast((node) => node.parent === parent);
  return { ...rest, selected: sibling ? leafBelow(rest, sibling.id) : parent };
}

export function titleOf(text: string): string {
  const line = text.trim().split("\n")[0] ?? "";
  const characters = [...line];
  return characters.length > 40 ? `${characters.slice(0, 40).join("")}…` : line;
}
