/** What the service is asked: the same public API that every other client has. */

import { batch, signal } from "@preact/signals";
import { events } from "./sse";

const KEY = "khaosz.key";

/** Resolves when the user has given a key, null when they would rather not. */
export const keyAsked = signal<((key: string | null) => void) | null>(null);

/** Whether a key was sent and the server did not take it. */
export const keyRefused = signal(false);

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
    readonly retryAfter: number | null = null,
  ) {
    super(message);
  }
}

/** The server could not be reached at all. */
export class Unreachable extends Error {}

export interface ModelCard {
  id: string;
  kind: "chat" | "embedding" | "rerank";
  context: number | null;
  parent: string | null;
}

export interface Leg {
  rank: number;
  score: number;
}

export interface Hit {
  number: number;
  doc: string;
  hash: string;
  start: number;
  end: number;
  page: number | null;
  headings: string[];
  text: string;
  score: number;
  legs: Record<string, Leg>;
}

export interface Citation {
  number: number;
  hash: string;
  start: number;
  end: number;
  doc: string;
  page: number | null;
  text: string;
}

export interface Retrieval {
  query: string;
  found: boolean;
  hits: Hit[];
  prompt: string | null;
  left_out: number;
  narrowed: boolean;
  /** Which base it was: kept with the answer, since the conversation may turn to another. */
  knowledge_base?: string | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
}

export interface Delta {
  content?: string;
  reasoning_content?: string;
  citations?: Citation[];
}

export interface Chunk {
  choices: { index: number; delta: Delta; finish_reason: string | null }[];
  usage?: Usage | null;
  retrieval?: Retrieval;
  error?: { message: string; code: string | null };
}

export interface KnowledgeBase {
  id: string;
  created: number;
  embedder: string | null;
  files: number;
  chunks: number;
  embedded: number;
  bytes: number;
  error: string | null;
  code: string | null;
}

export interface SourceText {
  hash: string;
  doc: string;
  length: number;
  page: number | null;
  start: number;
  end: number;
  text_start: number;
  text: string;
}

function stored(): string | null {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
}

export function keepKey(key: string, forLong: boolean): void {
  sessionStorage.setItem(KEY, key);
  if (forLong) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

export function headers(): Record<string, string> {
  const key = stored();
  if (!key) return {};
  // As bytes: a browser sends no other letters, and one that is typed by mistake (密, ｋ) would fail
  // before the server could say that the key is wrong.
  const bytes = new TextEncoder().encode(key);
  return { Authorization: `Bearer ${String.fromCharCode(...bytes)}` };
}

let asking: Promise<string | null> | null = null;

function askForKey(): Promise<string | null> {
  asking ??= new Promise<string | null>((resolve) => {
    keyAsked.value = (key) => {
      keyAsked.value = null;
      asking = null;
      resolve(key);
    };
  });
  return asking;
}

/** The response, if it is a good one. Asks for a key when the server wants one. */
export async function request(path: string, init: RequestInit = {}): Promise<Response> {
  for (;;) {
    let response: Response;
    try {
      response = await fetch(path, { ...init, headers: { ...init.headers, ...headers() } });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      throw new Unreachable(String(error));
    }
    if (response.ok) return response;
    keyRefused.value = response.status === 401 && stored() !== null;
    if (response.status === 401 && (await askForKey()) !== null) continue;
    throw await errorOf(response);
  }
}

async function errorOf(response: Response): Promise<ApiError> {
  const after = Number(response.headers.get("retry-after"));
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.message, error.code, after || null);
  } catch {
    return new ApiError(response.status, response.statusText, null, after || null);
  }
}

export async function getJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  const response = await request(path, signal ? { signal } : {});
  return response.json();
}

export async function sendJson<T>(
  method: string,
  path: string,
  body?: unknown,
  signal?: AbortSignal,
): Promise<T> {
  const init: RequestInit = { method, ...(signal ? { signal } : {}) };
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "Content-Type": "application/json" };
  }
  const response = await request(path, init);
  return (response.status === 204 ? undefined : await response.json()) as T;
}

/** Chunks of a streamed answer. A stream that ends before its end is an error. */
export async function* streamChat(body: unknown, signal: AbortSignal): AsyncGenerator<Chunk> {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  if (response.body === null) throw new Unreachable("no body");
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk: Chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, chunk.error.message, chunk.error.code);
    yield chunk;
  }
  throw new Unreachable("the stream ended early");
}

export async function countTokens(
  model: string,
  messages: { role: string; content: string }[],
): Promise<number> {
  const found = await sendJson<{ count: number }>("POST", "/tokenize", { model, messages });
  return found.count;
}

/** Whether the server has told what it offers: before that nobody knows where things are kept. */
export const met = signal(false);

/** What the server offers beside chats: absent parts are not shown. */
export const offers = signal({ conversations: false, bases: false, runs: false, preferences: false });

export async function lookAround(): Promise<void> {
  const document = await getJson<{ paths: Record<string, unknown> }>("/openapi.json");
  const has = (path: string) => path in document.paths;
  batch(() => {
    offers.value = {
      conversations: has("/v1/conversations"),
      bases: has("/v1/knowledge_bases"),
      runs: has("/v1/runs"),
      preferences: has("/v1/preferences"),
    };
    met.value = true;
  });
}
