/** The conversation that is open, and what happens in it. */

import { batch, computed, signal } from "@preact/signals";
import {
  ApiError,
  countTokens,
  getJson,
  lookAround,
  met,
  offers,
  streamChat,
  Unreachable,
  type KnowledgeBase,
  type ModelCard,
  type Usage,
} from "../api";
import { t } from "../i18n";
import { keeper, type Listed } from "../keep";
import { uuid } from "../platform";
import { worded } from "../reasons";
import { go, rename } from "../router";
import { sound } from "../sound";
import {
  based,
  changed,
  isEmpty,
  leafBelow,
  merged,
  newConversation,
  newNode,
  path,
  titleOf,
  withNode,
  without,
  type Conversation,
  type Node,
} from "../tree";

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

/** What the address names: a conversation that comes late is shown only while it is still that. */
let wanted: string | null = null;

export async function open(id: string | null): Promise<void> {
  wanted = id;
  problem.value = null;
  if (id === null) {
    if (current.value.nodes.length) current.value = newConversation();
    return;
  }
  if (id === current.value.id) return;
  try {
    await last; // what is being written now is to be read
    const kept = based(sound(await keeper().get(id)));
    if (wanted !== id) return;
    const mine = answered.get(id);
    const selected = running.value?.conversation === id && mine ? mine.selected : kept.selected;
    current.value = mine ? { ...merged(mine, kept), selected } : kept;
  } catch (error) {
    if (wanted !== id) return;
    if (!(error instanceof ApiError && error.status === 404)) problem.value = explain(error);
    go("chat");
  }
}

export function startAnew(): void {
  wanted = null;
  current.value = { ...newConversation(), knowledge_base: current.value.knowledge_base };
  problem.value = null;
  go("chat");
}

/** Change the conversation, and keep it where there is something to keep. */
export function update(change: Partial<Conversation>): void {
  renew({ ...current.value, ...change });
  if (current.value.nodes.length) void keep(current.value);
}

/** With the answers of this window: while they are under way they are further on here. */
const answered = new Map<string, Conversation>();

/** A conversation as this window has it by now, whether it is shown or not. */
function newest(id: string): Conversation | null {
  return current.value.id === id ? current.value : (answered.get(id) ?? null);
}

function renew(state: Conversation): void {
  if (current.value.id === state.id) current.value = state;
  if (answered.has(state.id)) answered.set(state.id, state);
}

let last: Promise<void> = Promise.resolve();

/** Those that are to be written, as they were when they were last shown. */
const waiting = new Map<string, Conversation>();

const removed = new Set<string>();

const AGAIN = 3000; // ms until what could not be kept is tried again
const unkept = new Map<string, Conversation>();

/** One after the other, each with the newest state by then. */
function keep(state: Conversation): Promise<void> {
  const { id } = state;
  const waits = waiting.has(id);
  waiting.set(id, state);
  if (waits) return last; // with every key in a prompt one is enough
  last = last.then(async () => {
    const conversation = newest(id) ?? waiting.get(id)!;
    waiting.delete(id);
    if (removed.has(id)) {
      unkept.delete(id);
      return;
    }
    try {
      const { kept, met } = await putMerged(conversation);
      const now = newest(id);
      const { base, revision } = based(kept);
      if (now !== null && revision !== undefined) {
        renew(met ? merged(now, kept) : { ...now, base: base!, revision });
        const more = kept.nodes.length > conversation.nodes.length;
        if (more && current.value.id === id) problem.value = t("conflict");
      }
      if (unkept.delete(id) && problem.value === t("unreachable")) problem.value = null;
    } catch (error) {
      problem.value = explain(error);
      if (error instanceof Unreachable) retry(conversation);
      return;
    }
    await refreshList().catch((error) => (problem.value = explain(error)));
  });
  return last;
}

/** Until it is kept: who leaves once the server is there again would lose it. */
function retry(state: Conversation): void {
  const { id } = state;
  const waits = unkept.has(id);
  unkept.set(id, state);
  if (waits) return;
  const again = setInterval(() => {
    const left = unkept.get(id);
    if (left) void keep(left);
    else clearInterval(again);
  }, AGAIN);
}

/** With what another window has written meanwhile, if any: nobody's answer is lost. */
async function putMerged(conversation: Conversation): Promise<{ kept: Conversation; met: boolean }> {
  let met = false;
  for (let left = 5; ; left--) {
    try {
      return { kept: await keeper().put(conversation), met };
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 409) || !left) throw error;
      try {
        conversation = merged(conversation, sound(await keeper().get(conversation.id)));
        met = true;
      } catch (gone) {
        if (!(gone instanceof ApiError && gone.status === 404)) throw gone;
        const { revision: _, ...fresh } = conversation; // deleted there, and gone on here
        conversation = fresh;
      }
    }
  }
}

export async function send(text: string): Promise<void> {
  if (!free.value) return; // or the question would stand there, neither answered nor kept
  const before = current.value;
  const question = newNode(before.selected, "user", text);
  const title = before.title || titleOf(text);
  current.value = withNode({ ...before, title }, question);
  await answer(question.id);
}

/** The same question in other words, beside the former one. */
export async function edit(node: Node, text: string): Promise<void> {
  if (!free.value) return;
  current.value = withNode(current.value, newNode(node.parent, "user", text));
  await answer(current.value.selected!);
}

export async function regenerate(node: Node): Promise<void> {
  if (node.parent !== null) await answer(node.parent);
}

export function select(node: Node): void {
  update({ selected: leafBelow(current.value, node.id) });
}

export function stop(): void {
  running.value?.abort.abort();
}

/** Answer the question, beside what answered it before. */
export async function answer(question: string): Promise<void> {
  const chosen = model.value;
  if (chosen === null || running.value !== null) return;
  const node = newNode(question, "assistant", "", chosen.id);
  const asked = path({ ...current.value, selected: question });
  const abort = new AbortController();
  const { id, selected: former } = current.value;
  const broken = current.value.nodes.filter((each) => each.parent === question && isEmpty(each));
  batch(() => {
    problem.value = null;
    const rest = broken.reduce((left, { id }) => without(left, id), current.value);
    current.value = withNode(rest, node);
    running.value = { conversation: id, node: node.id, abort, began: performance.now(), first: null };
    said.value = t("answering");
  });
  rename("chat", id);
  // The question first: it is there whatever becomes of the answer.
  answered.set(id, current.value);
  await keep(current.value);
  const begun = newest(id)!;
  // The user may look at another conversation meanwhile: this one goes on by itself.
  const shows = () => current.value.id === id;
  let frame = 0;
  let content = "";
  let reasoning = "";
  let rest: Partial<Node> = {};
  const draw = () => {
    frame = 0;
    const change = { content, reasoning: reasoning || null, ...rest };
    renew(changed(newest(id)!, node.id, change));
  };
  try {
    for await (const chunk of streamChat(requestOf(begun, asked, chosen.id), abort.signal)) {
      if (chunk.retrieval) {
        const { knowledge_base } = begun;
        rest = { ...rest, retrieval: { ...chunk.retrieval, knowledge_base } };
      }
      if (chunk.usage) {
        const { first, began } = running.value!;
        const seconds = (performance.now() - (first ?? began)) / 1000;
        usage.value = { ...usage.value, [node.id]: { usage: chunk.usage, seconds } };
      }
      for (const { delta, finish_reason } of chunk.choices) {
        if (delta.content || delta.reasoning_content) running.value!.first ??= performance.now();
        content += delta.content ?? "";
        reasoning += delta.reasoning_content ?? "";
        if (delta.citations) rest = { ...rest, citations: delta.citations };
        if (finish_reason) rest = { ...rest, finish_reason };
      }
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (abort.signal.aborted) rest = { ...rest, finish_reason: "stopped" };
    else {
      rest = { ...rest, finish_reason: "error" };
      if (shows()) problem.value = explain(error);
    }
  }
  cancelAnimationFrame(frame);
  draw();
  if (!content && !reasoning) {
    const rest = without(newest(id)!, node.id); // nothing came: the question stays, to be asked again,
    const there = rest.nodes.some((each) => each.id === former); // or the answer it has already
    renew({ ...rest, selected: there ? former : question });
  }
  batch(() => {
    running.value = null;
    said.value = t("answered");
  });
  await keep(newest(id)!);
}

function requestOf(conversation: Conversation, asked: Node[], id: string): unknown {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  return {
    model: id,
    messages: [...system, ...asked.map(({ role, content }) => ({ role, content }))],
    stream: true,
    stream_options: { include_usage: true },
    ...conversation.settings,
    ...(conversation.knowledge_base ? { knowledge_base: conversation.knowledge_base } : {}),
  };
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

export async function remove(id: string): Promise<void> {
  removed.add(id); // an answer under way does not bring it back
  try {
    await last; // nor does what is being written now
    await keeper().remove(id);
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 404)) {
      removed.delete(id); // it is still there, and is to be kept
      const state = newest(id);
      if (state !== null) await keep(state);
      problem.value = explain(error);
      return;
    }
  }
  if (running.value?.conversation === id) stop();
  if (current.value.id === id) startAnew();
  await refreshList().catch((error) => (problem.value = explain(error)));
}

export async function retitle(id: string, title: string): Promise<void> {
  try {
    const state = newest(id) ?? based(sound(await keeper().get(id)));
    renew({ ...state, title });
    await keep({ ...state, title });
  } catch (error) {
    problem.value = explain(error);
  }
}

/** Conversations of a file that an export wrote; how many there were. */
export async function importAll(text: string): Promise<number> {
  const given: unknown = JSON.parse(text);
  const listed = (given as { conversations?: unknown } | null)?.conversations;
  if (!Array.isArray(listed)) throw new SyntaxError("no conversations");
  const found = listed.map((each) => {
    const { revision: _, ...rest } = sound(each);
    return { ...rest, id: uuid() };
  });
  try {
    await keeper().add(found);
  } finally {
    await refreshList();
  }
  return found.length;
}
