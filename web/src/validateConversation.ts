/**
 * Validation of conversations from files, or from other programs by way of the server: malformed
 * parts are dropped, since they would crash the page.
 */

import type { Citation, Hit, Retrieval } from "./api";
import type { Conversation, Node, Settings } from "./tree";

type Fields = Record<string, unknown>;

const isText = (value: unknown): value is string => typeof value === "string";
const isNumber = (value: unknown): value is number => typeof value === "number";
const isCount = (value: unknown): value is number => Number.isInteger(value) && (value as number) >= 0;
const isFields = (value: unknown): value is Fields =>
  value !== null && typeof value === "object" && !Array.isArray(value);
const textOrNull = (value: unknown) => (isText(value) ? value : null);

/** The conversation without malformed optional parts. Throws `SyntaxError` if it is not one. */
export function validateConversation(value: unknown): Conversation {
  if (!isFields(value) || !isText(value.id) || !Array.isArray(value.nodes)) {
    throw new SyntaxError("not a conversation");
  }
  const nodes = value.nodes.map(validateNode);
  checkTree(nodes);
  const exists = nodes.some((node) => node.id === value.selected);
  return {
    ...(value as unknown as Conversation),
    title: textOrNull(value.title) ?? "",
    system: textOrNull(value.system),
    settings: validateSettings(value.settings),
    knowledge_base: textOrNull(value.knowledge_base),
    nodes,
    selected: exists ? (value.selected as string) : (nodes.at(-1)?.id ?? null),
  };
}

function validateNode(value: unknown): Node {
  if (!isFields(value)) throw new SyntaxError("not a message");
  const { id, role, content, created } = value;
  const parent = value.parent ?? null;
  if (!isText(id) || !isText(content) || !(parent === null || isText(parent))) {
    throw new SyntaxError("not a message");
  }
  if (role !== "user" && role !== "assistant") throw new SyntaxError("unknown role");
  return {
    id,
    parent,
    role,
    content,
    reasoning: textOrNull(value.reasoning),
    citations: Array.isArray(value.citations) ? value.citations.filter(isCitation) : null,
    retrieval: validateRetrieval(value.retrieval),
    left_out: isCount(value.left_out) ? value.left_out : null,
    ...(isFields(value.sampling) ? { sampling: validateSampling(value.sampling) } : {}),
    model: textOrNull(value.model),
    finish_reason: textOrNull(value.finish_reason),
    created: isNumber(created) ? created : 0,
  };
}

/** Ids are unique, and every message is reachable from a root. */
function checkTree(nodes: Node[]): void {
  const children = new Map<string | null, string[]>();
  for (const { id, parent } of nodes) children.set(parent, [...(children.get(parent) ?? []), id]);
  const reached = new Set<string>();
  const stack = [...(children.get(null) ?? [])];
  for (let id = stack.pop(); id !== undefined; id = stack.pop()) {
    if (reached.has(id)) throw new SyntaxError("duplicate message id");
    reached.add(id);
    stack.push(...(children.get(id) ?? []));
  }
  if (reached.size !== nodes.length) throw new SyntaxError("messages without a root");
}

function validateSampling(value: Fields): Record<string, number | boolean> {
  const entries = Object.entries(value).filter(([, each]) => isNumber(each) || typeof each === "boolean");
  return Object.fromEntries(entries) as Record<string, number | boolean>;
}

const NUMERIC = [
  "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed",
  "presence_penalty", "frequency_penalty", "thinking_budget",
] as const; // prettier-ignore

export function validateSettings(value: unknown): Settings {
  const settings: Settings = {};
  if (!isFields(value)) return settings;
  for (const name of NUMERIC) if (isNumber(value[name])) settings[name] = value[name];
  if (typeof value.thinking === "boolean") settings.thinking = value.thinking;
  if (Array.isArray(value.stop)) settings.stop = value.stop.filter(isText);
  return settings;
}

function isCitation(value: unknown): value is Citation {
  return isFields(value) && isNumber(value.number) && isPassage(value);
}

function isPassage({ doc, hash, start, end, text, ...places }: Fields): boolean {
  const hasText = isText(doc) && isText(hash) && isText(text);
  const { page, page_end, line, line_end } = places;
  const hasPlaces = [page_end, line, line_end].every((each) => each == null || isNumber(each));
  const hasPage = page === null || isNumber(page);
  return hasText && isNumber(start) && isNumber(end) && hasPage && hasPlaces;
}

function isHit(value: unknown): value is Hit {
  if (!isFields(value) || !isPassage(value)) return false;
  const { number, headings, score, legs } = value;
  const isScore = (leg: unknown) => isFields(leg) && isNumber(leg.rank) && isNumber(leg.score);
  const hasNumber = number == null || isNumber(number);
  const hasHeadings = Array.isArray(headings) && headings.every(isText);
  const hasScores = isNumber(score) && isFields(legs) && Object.values(legs).every(isScore);
  return hasNumber && hasHeadings && hasScores;
}

function validateRetrieval(value: unknown): Retrieval | null {
  if (!isFields(value) || !isText(value.query) || !Array.isArray(value.hits)) return null;
  return {
    ...(value as unknown as Retrieval),
    hits: value.hits.filter(isHit),
    prompt: textOrNull(value.prompt),
    left_out: isNumber(value.left_out) ? value.left_out : 0,
    knowledge_base: textOrNull(value.knowledge_base),
  };
}
