/** What the chat shows: signals, and what the server is asked for. */

import { computed, signal } from "@preact/signals";
import {
  ApiError,
  countTokens,
  getJson,
  lookAround,
  met,
  offers,
  Unreachable,
  type KnowledgeBase,
  type ModelCard,
  type Usage,
} from "../api";
import { t } from "../i18n";
import { keeper, type Listed } from "../keep";
import { worded } from "../reasons";
import { newConversation, path, type Conversation } from "../tree";

export const models = signal<ModelCard[]>([]);
export const chosenModel = signal<string | null>(localStorage.getItem("khaosz.model"));
export const bases = signal<KnowledgeBase[]>([]);
export const conversations = signal<Listed[]>([]);
export const search = signal("");
export const current = signal<Conversation>(newConversation());
export const problem = signal<string | null>(null);

/** The answer that is under way: it belongs to one conversation, which need not be the open one. */
export interface Running {
  conversation: string;
  node: string;
  abort: AbortController;
  began: number;
  first: number | null;
}
export const running = signal<Running | null>(null);

export function stop(): void {
  running.value?.abort.abort();
}

export const said = signal(""); // for those who listen: "answering", "answer complete"
export const usage = signal<Record<string, { usage: Usage; seconds: number }>>({});

export const shown = computed(() => path(current.value));
export const model = computed(() => {
  const chats = models.value.filter((each) => each.kind === "chat");
  return chats.find((each) => each.id === chosenModel.value) ?? chats[0] ?? null;
});
/** Whether something can be asked: one answer is under way at a time, and it needs a model. */
export const free = computed(() => running.value === null && model.value !== null);
export const answering = computed(() => running.value?.conversation === current.value.id);

export function choose(id: string): void {
  localStorage.setItem("khaosz.model", id);
  chosenModel.value = id;
}

export function explain(error: unknown): string {
  if (error instanceof Unreachable) return t("unreachable");
  if (error instanceof ApiError) {
    if (error.status === 503) return t("busy", { n: error.retryAfter ?? 1 });
    if (error.code === "context_length_exceeded") return t("contextFull");
    return worded(error.message, error.code);
  }
  return t("failed", { what: error instanceof Error ? error.message : String(error) });
}

export async function refreshModels(): Promise<void> {
  models.value = (await getJson<{ data: ModelCard[] }>("/v1/models")).data;
}

export async function refreshBases(): Promise<void> {
  bases.value = (await getJson<{ data: KnowledgeBase[] }>("/v1/knowledge_bases")).data;
}

/** Meet the server: at the start, and again where it could not be reached. */
export async function begin(): Promise<void> {
  problem.value = null;
  try {
    await lookAround();
    await Promise.all([refreshModels(), refreshList(), offers.value.bases && refreshBases()]);
  } catch (error) {
    problem.value = explain(error);
  }
}

export async function refreshList(): Promise<void> {
  if (!met.value) return; // nobody knows yet where they are kept
  const wanted = search.value;
  const found = await keeper().list(wanted);
  if (wanted === search.value) conversations.value = found; // or a later search is on its way
}

/** Tokens of what is shown; asked for once an answer is complete. */
export const filled = signal<number | null>(null);

let measured: object | null = null;

export async function measure(): Promise<void> {
  const own = (measured = {}); // a count that comes late is of another conversation
  const chosen = model.value;
  const messages = shown.value
    .filter((node) => node.content)
    .map(({ role, content }) => ({ role, content: content as string }));
  const system = current.value.system;
  if (system) messages.unshift({ role: "system" as "user", content: system });
  if (chosen === null || !messages.length) {
    filled.value = null;
    return;
  }
  try {
    const count = await countTokens(chosen.id, messages);
    if (measured === own) filled.value = count;
  } catch {
    if (measured === own) filled.value = null; // a meter, no more
  }
}
