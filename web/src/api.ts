/** Client of the service's public HTTP API. */

import { batch, signal } from "@preact/signals";
import { events } from "./sse";

const KEY = "khaosz.key";

/** Set while the page prompts for a key: call it with the key, or with null if the user declines. */
export const keyPrompt = signal<((key: string | null) => void) | null>(null);

/** The server rejected the key that was sent. */
export const keyRejected = signal(false);

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

/** The server can't be reached, or the connection broke. */
export class Unreachable extends Error {}

export interface ModelCard {
  id: string;
  kind: "chat" | "embedding" | "rerank";
  context: number | null;
  parent: string | null;
  /** Whether answers begin with thoughts, and what the switch is by default. */
  thinking?: "switch_on" | "switch_off" | "always" | "none" | null;
  /** Parameters of requests that name none. */
  sampling?: Record<string, number> | null;
}

export interface Pull {
  name: string;
  state: "running" | "complete" | "failed" | "cancelled";
  bytes: number;
  total: number;
  rate: number | null;
  remaining: number | null; // seconds
  source: string | null;
  model: string | null;
  error: string | null;
  code: string | null;
}

/** A model of the catalogue, or a file on the server's machine. */
export interface CatalogueEntry {
  name: string;
  origin: "catalogue" | "pulled" | "trained" | "ollama" | "lmstudio" | "hub";
  bytes: number;
  memory: number | null;
  memory_is_whole: boolean;
  fits: boolean | null;
  here: boolean;
  problem: string | null;
  served: string | null;
  staged: number;
  sources: string[];
  kind: "chat" | "translation" | null;
  licence: string | null;
  limited: boolean;
  languages: string | null;
  thinking: string | null;
  pull: Pull | null;
}

export interface Catalogue {
  free_memory: number | null;
  memory_limit: number | null;
  free_disk: number;
  proposed: string | null;
  data: CatalogueEntry[];
}

export interface RetrieverScore {
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
  page_end?: number | null;
  line?: number | null;
  line_end?: number | null;
  headings: string[];
  text: string;
  score: number;
  legs: Record<string, RetrieverScore>; // by retriever: "lexical", "dense"
}

export interface Citation {
  number: number;
  hash: string;
  start: number;
  end: number;
  doc: string;
  page: number | null;
  /** Citations saved earlier lack these three. */
  page_end?: number | null;
  line?: number | null;
  line_end?: number | null;
  text: string;
}

export interface Retrieval {
  query: string;
  found: boolean;
  /** Whether the model was asked; answers saved earlier lack it. */
  asked?: boolean;
  hits: Hit[];
  prompt: string | null;
  left_out: number;
  narrowed: boolean;
  /** Saved with the answer, since the conversation may switch to another knowledge base. */
  knowledge_base?: string | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
}

export interface Timings {
  wait_seconds: number | null;
  generation_seconds: number;
}

/** An answer that the server generates and stores; it has the id of its message. */
export interface Generation {
  id: string;
  state: "queued" | "running" | "complete" | "stopped" | "interrupted" | "failed";
  can_continue: boolean;
  usage: Usage | null;
  timings: Timings;
}

export interface Delta {
  content?: string;
  reasoning_content?: string;
  citations?: Citation[];
}

export interface LanguageWarning {
  language: "zh" | "en";
  model: string;
}

export interface Chunk {
  choices: { index: number; delta: Delta; finish_reason: string | null }[];
  usage?: Usage | null;
  retrieval?: Retrieval;
  left_out?: number;
  /** In the first chunk: the model is known to lack the language of the question; `model` has it. */
  warning?: LanguageWarning | null;
  /** The last chunk of a stored generation has these. */
  timings?: Timings;
  can_continue?: boolean;
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

function storedKey(): string | null {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
}

export function storeKey(key: string, remember: boolean): void {
  sessionStorage.setItem(KEY, key);
  if (remember) localStorage.setItem(KEY, key);
  else localStorage.removeItem(KEY);
}

export function headers(): Record<string, string> {
  const key = storedKey();
  if (!key) return {};
  // As bytes: header values are limited to Latin-1, and other characters (密, ｋ) would make fetch
  // throw before the server could reject the key.
  const bytes = new TextEncoder().encode(key);
  return { Authorization: `Bearer ${String.fromCharCode(...bytes)}` };
}

/** Whether the server takes the stored key. True if it can't be asked: requests report that. */
export async function isKeyAccepted(): Promise<boolean> {
  try {
    return (await fetch("/v1/models", { headers: headers() })).status !== 401;
  } catch {
    return true;
  }
}

let pendingKey: Promise<string | null> | null = null;

/** The user declined to enter a key: refreshing in the background must not ask again. */
let declined = false;

export function askForKeyAgain(): void {
  declined = false;
}

function requestKey(): Promise<string | null> {
  pendingKey ??= new Promise<string | null>((resolve) => {
    keyPrompt.value = (key) => {
      declined = key === null;
      keyPrompt.value = null;
      pendingKey = null;
      resolve(key);
    };
  });
  return pendingKey;
}

/** Fetch; prompts for a key on status 401. Throws `ApiError` or `Unreachable`. */
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
    keyRejected.value = response.status === 401 && storedKey() !== null;
    const mayAsk = !declined || (init.method ?? "GET") !== "GET";
    if (response.status === 401 && mayAsk && (await requestKey()) !== null) continue;
    throw await apiError(response);
  }
}

async function apiError(response: Response): Promise<ApiError> {
  const retryAfter = Number(response.headers.get("retry-after"));
  try {
    const { error } = await response.json();
    return new ApiError(response.status, error.message, error.code, retryAfter || null);
  } catch {
    return new ApiError(response.status, response.statusText, null, retryAfter || null);
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

/** Chunks of a streamed answer. Throws `Unreachable` if the stream ends without `[DONE]`. */
export async function* streamChat(body: unknown, signal: AbortSignal): AsyncGenerator<Chunk> {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
  yield* chunks(response);
}

/** Chunks of a stored generation from its beginning, as it grows. Throws as `streamChat` does. */
export async function* streamGeneration(id: string, signal: AbortSignal): AsyncGenerator<Chunk> {
  yield* chunks(await request(`/v1/generations/${id}?stream=true`, { signal }));
}

async function* chunks(response: Response): AsyncGenerator<Chunk> {
  if (response.body === null) throw new Unreachable("response has no body");
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk: Chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk.error.message, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    // Of `fetch`: the connection broke.
    throw error instanceof TypeError ? new Unreachable(String(error)) : error;
  }
  throw new Unreachable("the stream ended early");
}

/** Tokens of a chat's prompt, and how many of the oldest messages it leaves out. */
export interface PromptSize {
  count: number;
  left_out: number;
}

export interface ChatMessage {
  role: "system" | "user" | "assistant";
  content: string;
}

export function countTokens(
  model: string,
  messages: ChatMessage[],
  maxTokens: number | undefined,
): Promise<PromptSize> {
  const body = { model, messages, max_tokens: maxTokens, truncation: "auto" };
  return sendJson<PromptSize>("POST", "/tokenize", body);
}

/** How many tokens a text has. */
export async function countText(model: string, prompt: string): Promise<number> {
  return (await sendJson<{ count: number }>("POST", "/tokenize", { model, prompt })).count;
}

/** Features are known; until then the page can't know where conversations are stored. */
export const connected = signal(false);

/** Optional parts of the server; views of missing parts are hidden. */
export const features = signal({
  catalogue: false,
  conversations: false,
  generations: false,
  knowledgeBases: false,
  runs: false,
  preferences: false,
});

export async function discoverFeatures(): Promise<void> {
  const document = await getJson<{ paths: Record<string, unknown> }>("/openapi.json");
  const has = (path: string) => path in document.paths;
  batch(() => {
    features.value = {
      catalogue: has("/v1/catalogue"),
      conversations: has("/v1/conversations"),
      generations: has("/v1/generations/{generation}"),
      knowledgeBases: has("/v1/knowledge_bases"),
      runs: has("/v1/runs"),
      preferences: has("/v1/preferences"),
    };
    connected.value = true;
  });
}
