/** State of the chat, as signals, and the requests that fill it. */

import { batch, computed, signal } from "@preact/signals";
import {
  ApiError,
  askForKeyAgain,
  connected,
  countTokens,
  discoverFeatures,
  features,
  getJson,
  sendJson,
  Unreachable,
  type ChatMessage,
  type KnowledgeBase,
  type LanguageWarning,
  type ModelCard,
  type PromptSize,
  type Usage,
} from "../api";
import { conversationStorage, type Listed } from "../conversationStorage";
import { errorText } from "../errorText";
import { t } from "../i18n";
import { path, type Conversation } from "../tree";
import { freshConversation } from "./sampling";

export const models = signal<ModelCard[]>([]);
export const selectedModel = signal<string | null>(localStorage.getItem("khaosz.model"));
export const knowledgeBases = signal<KnowledgeBase[]>([]);
export const conversations = signal<Listed[]>([]);
export const moreConversations = signal(false); // than are listed
export const search = signal("");
export const current = signal<Conversation>(freshConversation());
export const problem = signal<string | null>(null);

/** An answer being generated, which may belong to a conversation that is not open. */
export interface Running {
  conversation: string;
  node: string;
  /** Ends the stream to this window, which ends an answer that the server does not store. */
  abort: AbortController;
  /** Whether the server stores it. */
  stored: "no" | "requested" | "yes";
  stopping: boolean;
  startedAt: number; // ms, as performance.now()
  firstTokenAt: number | null;
}
/** By the id of the answer. */
export const running = signal<ReadonlyMap<string, Running>>(new Map());

/** Stop the answer to the open conversation. */
export function stop(): void {
  for (const each of running.value.values()) {
    if (each.conversation === current.value.id) void stopAnswer(each);
  }
}

export async function stopAnswer(answer: Running): Promise<void> {
  answer.stopping = true;
  if (answer.stored === "no") answer.abort.abort();
  if (answer.stored !== "yes") return; // a requested one is stopped when the server has started it
  try {
    await sendJson("POST", `/v1/generations/${answer.node}/stop`);
  } catch (error) {
    problem.value = explain(error);
  }
}

export const announcement = signal(""); // for screen readers
/** By message. A map, since ids of imported conversations may be any text. */
export const usage = signal<ReadonlyMap<string, { usage: Usage; seconds: number }>>(new Map());
/** That the model lacks the language of a conversation; shown once for each. */
export const languageWarning = signal<(LanguageWarning & { conversation: string; lacks: string }) | null>(null);
const warned = new Set<string>();

export function warnOfLanguage(conversation: string, warning: LanguageWarning, lacks: string): void {
  const key = `${conversation} ${warning.language}`;
  if (warned.has(key)) return;
  warned.add(key);
  languageWarning.value = { ...warning, conversation, lacks };
}

/** How long a model thought, and in how many tokens, by message; of answers that this window saw grow. */
export const thoughts = signal<ReadonlyMap<string, { seconds: number; tokens: number | null }>>(new Map());
/** Answers that the server can continue. */
export const continuable = signal<ReadonlySet<string>>(new Set());

export const visibleNodes = computed(() => path(current.value));
export const model = computed(() => {
  const chats = models.value.filter((each) => each.kind === "chat");
  return chats.find((each) => each.id === selectedModel.value) ?? chats[0] ?? null;
});
/** The open conversation is being answered. */
export const generating = computed(() =>
  [...running.value.values()].some((each) => each.conversation === current.value.id),
);
/** A conversation gets one answer at a time, and it needs a model. */
export const canGenerate = computed(() => !generating.value && model.value !== null);

export function selectModel(id: string): void {
  localStorage.setItem("khaosz.model", id);
  selectedModel.value = id;
}

/** The message of an error, in the page's language. */
export function explain(error: unknown): string {
  if (error instanceof Unreachable) return t("unreachable");
  if (error instanceof ApiError) {
    if (error.status === 503) return t("busy", { n: error.retryAfter ?? 1 });
    if (error.code === "context_length_exceeded") return t("contextFull");
    return errorText(error.message, error.code);
  }
  return t("failed", { what: error instanceof Error ? error.message : String(error) });
}

export async function refreshModels(): Promise<void> {
  models.value = (await getJson<{ data: ModelCard[] }>("/v1/models")).data;
}

export async function refreshKnowledgeBases(): Promise<void> {
  knowledgeBases.value = (await getJson<{ data: KnowledgeBase[] }>("/v1/knowledge_bases")).data;
}

/** Load what the page needs from the server: at the start, and on retry. */
export async function connect(): Promise<void> {
  problem.value = null;
  askForKeyAgain();
  try {
    await discoverFeatures();
    await Promise.all([
      refreshModels(),
      refreshList(),
      features.value.knowledgeBases && refreshKnowledgeBases(),
    ]);
  } catch (error) {
    problem.value = explain(error);
  }
}

export async function refreshList(): Promise<void> {
  if (!connected.value) return; // the storage is not known yet
  const query = search.value;
  const { data, hasMore } = await conversationStorage().list(query, listLength);
  if (query !== search.value) return; // a later search is running
  batch(() => {
    conversations.value = data;
    moreConversations.value = hasMore;
  });
}

const LIST_STEP = 100;
let listLength = LIST_STEP;

export function listMore(): Promise<void> {
  listLength = conversations.value.length + LIST_STEP;
  return refreshList();
}

export function searchList(query: string): void {
  listLength = LIST_STEP;
  search.value = query;
}

const counted = signal<{ conversation: string; size: PromptSize } | null>(null);

/** What the open conversation takes of the context; counted when an answer is complete. */
export const promptSize = computed(() =>
  counted.value?.conversation === current.value.id ? counted.value.size : null,
);

/** How many of the visible messages, the oldest, the model does not see. */
export const leftOut = computed(() => {
  const last = visibleNodes.value.findLast((node) => node.left_out !== null)?.left_out ?? 0;
  // Passages need room too, which only the answer knows.
  if (promptSize.value === null || generating.value || current.value.knowledge_base !== null) return last;
  return promptSize.value.left_out;
});

let latestCount: object | null = null;

export async function countContextTokens(): Promise<void> {
  const count = (latestCount = {}); // a late result belongs to another conversation
  const chosen = model.value;
  const { id, system, settings } = current.value;
  const messages: ChatMessage[] = visibleNodes.value.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });
  if (chosen === null || !messages.length) {
    counted.value = null;
    return;
  }
  try {
    const size = await countTokens(chosen.id, messages, settings.max_tokens);
    if (latestCount === count) counted.value = { conversation: id, size };
  } catch {
    if (latestCount === count) counted.value = null; // the meter is optional
  }
}
