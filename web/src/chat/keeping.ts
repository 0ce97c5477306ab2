/** Conversations are opened, changed, and kept: nobody's answer is lost, in several windows too. */

import { ApiError, Unreachable } from "../api";
import { t } from "../i18n";
import { keeper } from "../keep";
import { uuid } from "../platform";
import { go } from "../router";
import { sound } from "../sound";
import { based, leafBelow, merged, newConversation, type Conversation, type Node } from "../tree";
import { current, explain, problem, refreshList, running, stop } from "./state";

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

export function answeredHere(state: Conversation): void {
  answered.set(state.id, state);
}

/** A conversation as this window has it by now, whether it is shown or not. */
export function newest(id: string): Conversation | null {
  return current.value.id === id ? current.value : (answered.get(id) ?? null);
}

export function renew(state: Conversation): void {
  if (current.value.id === state.id) current.value = state;
  if (answered.has(state.id)) answered.set(state.id, state);
}

let last: Promise<void> = Promise.resolve();

/** Those that are to be written, as they were when they were last shown. */
const waiting = new Map<string, Conversation>();

const removed = new Set<string>();

const AGAIN = 3000; // ms until what could not be kept is tried again
const unkept = new Map<string, Conversation>();
let why = ""; // it could not be kept, as it was told

/** One after the other, each with the newest state by then. */
export function keep(state: Conversation): Promise<void> {
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
      if (unkept.delete(id) && problem.value === why) problem.value = null;
    } catch (error) {
      problem.value = explain(error);
      if (error instanceof Unreachable || (error instanceof ApiError && error.status >= 500)) {
        why = problem.value;
        retry(conversation);
      }
      return;
    }
    await refreshList().catch((error) => (problem.value = explain(error)));
  });
  return last;
}

/** Until it is kept: who leaves once the server is there, or has room, would lose it. */
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

export function select(node: Node): void {
  update({ selected: leafBelow(current.value, node.id) });
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
