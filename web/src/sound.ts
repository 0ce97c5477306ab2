/**
 * What a file, or another program by way of the server, calls a conversation: the page takes no
 * part of it at its word, since one that is of another form would end the page with it.
 */

import type { Citation, Hit, Retrieval } from "./api";
import type { Conversation, Node, Settings } from "./tree";

type Fields = Record<string, unknown>;

const isText = (value: unknown): value is string => typeof value === "string";
const isNumber = (value: unknown): value is number => typeof value === "number";
const isFields = (value: unknown): value is Fields =>
  value !== null && typeof value === "object" && !Array.isArray(value);
const textOf = (value: unknown) => (isText(value) ? value : null);

/** With those parts that can be shown. Throws `SyntaxError` for what is no conversation. */
export function sound(given: unknown): Conversation {
  if (!isFields(given) || !isText(given.id) || !Array.isArray(given.nodes)) {
    throw new SyntaxError("no conversation");
  }
  const nodes = given.nodes.map(nodeOf);
  checkTree(nodes);
  const there = nodes.some((node) => node.id === given.selected);
  return {
    ...(given as unknown as Conversation),
    title: textOf(given.title) ?? "",
    system: textOf(given.system),
    settings: settingsOf(given.settings),
    knowledge_base: textOf(given.knowledge_base),
    nodes,
    selected: there ? (given.selected as string) : (nodes.at(-1)?.id ?? null),
  };
}

function nodeOf(given: unknown): Node {
  if (!isFields(given)) throw new SyntaxError("no message");
  const { id, role, content, created } = given;
  const parent = given.parent ?? null;
  if (!isText(id) || !isText(content) || !(parent === null || isText(parent))) {
    throw new SyntaxError("no message");
  }
  if (role !== "user" && role !== "assistant") throw new SyntaxError("a message of nobody");
  return {
    id,
    parent,
    role,
    content,
    reasoning: textOf(given.reasoning),
    citations: Array.isArray(given.citations) ? given.citations.filter(isCitation) : null,
    retrieval: retrievalOf(given.retrieval),
    model: textOf(given.model),
    finish_reason: textOf(given.finish_reason),
    created: isNumber(created) ? created : 0,
  };
}

/** Every message has an id of its own, and its forebears end with a first one. */
function checkTree(nodes: Node[]): void {
  const below = new Map<string | null, string[]>();
  for (const { id, parent } of nodes) below.set(parent, [...(below.get(parent) ?? []), id]);
  const reached = new Set<string>();
  const waiting = [...(below.get(null) ?? [])];
  for (let id = waiting.pop(); id !== undefined; id = waiting.pop()) {
    if (reached.has(id)) throw new SyntaxError("two messages with one id");
    reached.add(id);
    waiting.push(...(below.get(id) ?? []));
  }
  if (reached.size !== nodes.length) throw new SyntaxError("messages in a circle");
}

const NUMERIC = [
  "temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty",
] as const; // prettier-ignore

function settingsOf(given: unknown): Settings {
  const found: Settings = {};
  if (!isFields(given)) return found;
  for (const name of NUMERIC) if (isNumber(given[name])) found[name] = given[name];
  if (Array.isArray(given.stop)) found.stop = given.stop.filter(isText);
  return found;
}

function isCitation(given: unknown): given is Citation {
  return isFields(given) && isNumber(given.number) && isPassage(given);
}

function isPassage({ doc, hash, start, end, page, text }: Fields): boolean {
  const named = isText(doc) && isText(hash) && isText(text);
  return named && isNumber(start) && isNumber(end) && (page === null || isNumber(page));
}

function isHit(given: unknown): given is Hit {
  if (!isFields(given) || !isPassage(given)) return false;
  const { number, headings, score, legs } = given;
  const isLeg = (leg: unknown) => isFields(leg) && isNumber(leg.rank) && isNumber(leg.score);
  const named = number == null || isNumber(number);
  const placed = Array.isArray(headings) && headings.every(isText) && isNumber(score);
  return named && placed && isFields(legs) && Object.values(legs).every(isLeg);
}

function retrievalOf(given: unknown): Retrieval | null {
  if (!isFields(given) || !isText(given.query) || !Array.isArray(given.hits)) return null;
  return {
    ...(given as unknown as Retrieval),
    hits: given.hits.filter(isHit),
    prompt: textOf(given.prompt),
    left_out: isNumber(given.left_out) ? given.left_out : 0,
    knowledge_base: textOf(given.knowledge_base),
  };
}
