/** Opening, changing and saving conversations without losing an answer, also in several windows. */

import { ApiError, Unreachable } from "../api";
import { conversationStorage } from "../conversationStorage";
import { t } from "../i18n";
import { uuid } from "../platform";
import { go } from "../router";
import {
  leafBelow, merge, withBase, type Conversation, type Node,
} from "../tree"; // prettier-ignore
import { validateConversation } from "../validateConversation";
import { freshConversation } from "./sampling";
import { current, explain, problem, refreshList, running } from "./state";

/** The conversation in the address: one that loads late is shown only if it is still this one. */
let requestedId: string | null = null;

export async function open(id: string | null): Promise<void> {
  requestedId = id;
  problem.value = null;
  if (id === null) {
    if (current.value.nodes.length) current.value = freshConversation();
    return;
  }
  if (id === current.value.id) return;
  try {
    await lastSave; // so that what is being saved is read
    const stored = withBase(validateConversation(await conversationStorage().get(id)));
    if (requestedId !== id) return;
    const local = answered.get(id);
    const selected = local && isRunning(id) ? local.selected : stored.selected;
    current.value = local ? { ...merge(local, stored), selected } : stored;
  } catch (error) {
    if (requestedId !== id) return;
    if (!(error instanceof ApiError && error.status === 404)) problem.value = explain(error);
    go("chat");
  }
}

function isRunning(id: string): boolean {
  return [...running.value.values()].some((each) => each.conversation === id);
}

export function startNewChat(): void {
  requestedId = null;
  current.value = { ...freshConversation(), knowledge_base: current.value.knowledge_base };
  problem.value = null;
  go("chat");
}

/** Change the current conversation; save it unless it is empty. */
export function update(change: Partial<Conversation>): void {
  setState({ ...current.value, ...change });
  if (current.value.nodes.length) void save(current.value);
}

/** Conversations with answers from this window, which may be ahead of what is stored. */
const answered = new Map<string, Conversation>();

export function trackAnswered(state: Conversation): void {
  answered.set(state.id, state);
}

/** The latest state of a conversation in this window, visible or not. */
export function latest(id: string): Conversation | null {
  return current.value.id === id ? current.value : (answered.get(id) ?? null);
}

export function setState(state: Conversation): void {
  if (current.value.id === state.id) current.value = state;
  if (answered.has(state.id)) answered.set(state.id, state);
}

let lastSave: Promise<void> = Promise.resolve();

/** Nothing is being saved. */
export const saved = () => lastSave;

/** States waiting to be saved, as they were when last shown. */
const queued = new Map<string, Conversation>();

const removed = new Set<string>();

const RETRY_INTERVAL = 3000; // ms
/** States that could not be saved and are retried. */
const pendingSaves = new Map<string, Conversation>();
let saveProblem = ""; // the message shown for the failed save

/** Saves run one at a time, each with the latest state at that moment. */
export function save(state: Conversation): Promise<void> {
  const { id } = state;
  const isQueued = queued.has(id);
  queued.set(id, state);
  if (isQueued) return lastSave; // one save for many keystrokes in a prompt
  lastSave = lastSave.then(async () => {
    const conversation = latest(id) ?? queued.get(id)!;
    queued.delete(id);
    if (removed.has(id)) {
      pendingSaves.delete(id);
      return;
    }
    try {
      const { saved, conflict } = await putMerged(conversation);
      const newer = latest(id);
      const { base, revision } = withBase(saved);
      if (newer !== null && revision !== undefined) {
        setState(conflict ? merge(newer, saved) : { ...newer, base: base!, revision });
        const added = saved.nodes.length > conversation.nodes.length;
        if (added && current.value.id === id) problem.value = t("conflict");
      }
      if (pendingSaves.delete(id) && problem.value === saveProblem) problem.value = null;
    } catch (error) {
      problem.value = explain(error);
      if (error instanceof Unreachable || (error instanceof ApiError && error.status >= 500)) {
        saveProblem = problem.value;
        retry(conversation);
      }
      return;
    }
    await refreshList().catch((error) => (problem.value = explain(error)));
  });
  return lastSave;
}

/** Until saved: closing the page after the server is back, or has disk space again, loses nothing. */
function retry(state: Conversation): void {
  const { id } = state;
  const isPending = pendingSaves.has(id);
  pendingSaves.set(id, state);
  if (isPending) return;
  const timer = setInterval(() => {
    const pending = pendingSaves.get(id);
    if (pending) void save(pending);
    else clearInterval(timer);
  }, RETRY_INTERVAL);
}

/** Save; on a revision conflict, merge with what another window saved and try again. */
async function putMerged(
  conversation: Conversation,
): Promise<{ saved: Conversation; conflict: boolean }> {
  let conflict = false;
  for (let attemptsLeft = 5; ; attemptsLeft--) {
    try {
      return { saved: await conversationStorage().put(conversation), conflict };
    } catch (error) {
      if (!(error instanceof ApiError && error.status === 409) || !attemptsLeft) throw error;
      try {
        const stored = validateConversation(await conversationStorage().get(conversation.id));
        conversation = merge(conversation, stored);
        conflict = true;
      } catch (missing) {
        if (!(missing instanceof ApiError && missing.status === 404)) throw missing;
        const { revision: _, ...fresh } = conversation; // deleted elsewhere, continued here
        conversation = fresh;
      }
    }
  }
}

export function select(node: Node): void {
  update({ selected: leafBelow(current.value, node.id) });
}

export async function remove(id: string): Promise<void> {
  removed.add(id); // a running answer must not restore it
  try {
    await lastSave; // nor must a save in progress
    await conversationStorage().remove(id);
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 404)) {
      removed.delete(id); // still stored, so save it again
      const state = latest(id);
      if (state !== null) await save(state);
      problem.value = explain(error);
      return;
    }
  }
  for (const each of running.value.values()) if (each.conversation === id) each.abort.abort();
  if (current.value.id === id) startNewChat();
  await refreshList().catch((error) => (problem.value = explain(error)));
}

export async function retitle(id: string, title: string): Promise<void> {
  try {
    const state = latest(id) ?? withBase(validateConversation(await conversationStorage().get(id)));
    setState({ ...state, title });
    await save({ ...state, title });
  } catch (error) {
    problem.value = explain(error);
  }
}

/** Import an exported file; returns the number of conversations. Throws `SyntaxError`. */
export async function importAll(text: string): Promise<number> {
  const file: unknown = JSON.parse(text);
  const records = (file as { conversations?: unknown } | null)?.conversations;
  if (!Array.isArray(records)) throw new SyntaxError("no conversations");
  const conversations = records.map((each) => {
    const { revision: _, ...rest } = validateConversation(each);
    return { ...rest, id: uuid() };
  });
  try {
    await conversationStorage().add(conversations);
  } finally {
    await refreshList();
  }
  return conversations.length;
}
