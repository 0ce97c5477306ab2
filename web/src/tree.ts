/** A conversation is a tree: to edit a message or to answer again adds a sibling. */

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

/** What a conversation has beside its messages. */
export interface Head {
  title: string;
  system: string | null;
  settings: Settings;
  knowledge_base: string | null;
}

export interface Conversation extends Head {
  id: string;
  nodes: Node[];
  selected: string | null;
  revision?: number;
  /** How `revision` had it: what differs from that was changed in this window. */
  base?: Head;
}

/** As it is kept: what is changed from now on is told from what was changed elsewhere. */
export function based(kept: Conversation): Conversation {
  const { title, system, settings, knowledge_base } = kept;
  return { ...kept, base: { title, system, settings, knowledge_base } };
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

/** Messages from the first to the one that is selected. */
export function path(conversation: Conversation): Node[] {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const found: Node[] = [];
  let at = conversation.selected;
  while (at !== null) {
    const node = byId.get(at);
    if (node === undefined || found.includes(node)) break;
    found.unshift(node);
    at = node.parent;
  }
  return found;
}

export function siblings(conversation: Conversation, node: Node): Node[] {
  return conversation.nodes.filter((each) => each.parent === node.parent);
}

/** The newest leaf below a message, itself where nothing is below it. */
export function leafBelow(conversation: Conversation, id: string): string {
  for (;;) {
    const below = conversation.nodes.findLast((node) => node.parent === id);
    if (below === undefined) return id;
    id = below.id;
  }
}

export function withNode(conversation: Conversation, node: Node): Conversation {
  return { ...conversation, nodes: [...conversation.nodes, node], selected: node.id };
}

export function changed(
  conversation: Conversation,
  id: string,
  change: Partial<Node>,
): Conversation {
  const nodes = conversation.nodes.map((node) => (node.id === id ? { ...node, ...change } : node));
  return { ...conversation, nodes };
}

/** What two windows made of one conversation: the messages of both and the changes of both, those
 * of this window where they meet, shown as it was here. */
export function merged(ours: Conversation, theirs: Conversation): Conversation {
  const own = new Map(ours.nodes.map((node) => [node.id, node]));
  const known = new Set(theirs.nodes.map((node) => node.id));
  const nodes = theirs.nodes.map((node) => further(own.get(node.id) ?? node, node));
  nodes.push(...ours.nodes.filter((node) => !known.has(node.id)));
  const head = based(theirs);
  const { base } = ours;
  const mine = (name: keyof Head) => JSON.stringify(ours[name]) !== JSON.stringify(base?.[name]);
  const changes = (["title", "system", "settings", "knowledge_base"] as const).filter(mine);
  const kept = Object.fromEntries(changes.map((name) => [name, ours[name]]));
  return { ...head, ...kept, nodes, selected: ours.selected };
}

/** A message is written in one window; the other may have it as it was while it came. */
function further(ours: Node, theirs: Node): Node {
  const [here, there] = [ours, theirs].map((node) => node.finish_reason !== null);
  if (here !== there) return here ? ours : theirs;
  return written(ours) >= written(theirs) ? ours : theirs;
}

function written(node: Node): number {
  return node.content.length + (node.reasoning?.length ?? 0);
}

export function isEmpty(node: Node): boolean {
  return !node.content && !node.reasoning;
}

/** Without a message and what is below it; the selection moves to what is left. */
export function without(conversation: Conversation, id: string): Conversation {
  const gone = new Set([id]);
  // Children come after their parents.
  for (const node of conversation.nodes) {
    if (node.parent !== null && gone.has(node.parent)) gone.add(node.id);
  }
  const parent = conversation.nodes.find((node) => node.id === id)?.parent ?? null;
  const nodes = conversation.nodes.filter((node) => !gone.has(node.id));
  const left = { ...conversation, nodes };
  if (conversation.selected === null || !gone.has(conversation.selected)) return left;
  const beside = nodes.findLast((node) => node.parent === parent);
  return { ...left, selected: beside ? leafBelow(left, beside.id) : parent };
}

export function titleOf(text: string): string {
  const line = text.trim().split("\n")[0] ?? "";
  const letters = [...line];
  return letters.length > 40 ? `${letters.slice(0, 40).join("")}…` : line;
}
