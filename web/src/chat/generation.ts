/** Sending prompts and streaming answers. */

import { batch } from "@preact/signals";
import {
  ApiError, countText, features, getJson, sendJson, streamChat, streamGeneration, Unreachable,
  type Chunk, type Generation, type ModelCard,
} from "../api"; // prettier-ignore
import { conversationStorage } from "../conversationStorage";
import { t } from "../i18n";
import { rename } from "../router";
import {
  isEmpty,
  leafBelow,
  merge,
  newNode,
  path,
  titleOf,
  updateNode,
  withNode,
  without,
  type Conversation,
  type Node,
} from "../tree";
import { validateConversation } from "../validateConversation";
import { latest, save, saved, setState, trackAnswered } from "./persistence";
import { inForce, requestSettings } from "./sampling";
import {
  announcement, canGenerate, continuable, current, explain, generating, model, problem, refreshList,
  running, stopAnswer, thoughts, usage, warnOfLanguage, type Running,
} from "./state"; // prettier-ignore

export async function send(text: string): Promise<void> {
  if (!canGenerate.value) return; // the prompt would be neither answered nor saved
  const before = current.value;
  const question = newNode(before.selected, "user", text);
  const title = before.title || titleOf(text);
  current.value = withNode({ ...before, title }, question);
  await answer(question.id);
}

/** Send an edited prompt as a sibling of the original. */
export async function edit(node: Node, text: string): Promise<void> {
  if (!canGenerate.value) return;
  current.value = withNode(current.value, newNode(node.parent, "user", text));
  await answer(current.value.selected!);
}

/** anyway: ask the model although no passage seems relevant. */
export async function regenerate(node: Node, anyway = false): Promise<void> {
  if (node.parent !== null) await answer(node.parent, anyway);
}

/** Answer the question, as a sibling of earlier answers. */
export async function answer(question: string, anyway = false): Promise<void> {
  const chosen = model.value;
  if (chosen === null || generating.value) return;
  const fresh = newNode(question, "assistant", "", chosen.id);
  const node = { ...fresh, sampling: inForce(chosen, current.value.settings) };
  const messages = path({ ...current.value, selected: question });
  const { id, selected: previous } = current.value;
  const stored = features.value.generations;
  // Of failed answers; an empty one without an end may be growing for another window.
  const empty = current.value.nodes.filter(
    (each) => each.parent === question && isEmpty(each) && !(stored && each.finish_reason === null),
  );
  const rest = empty.reduce((left, { id }) => without(left, id), current.value);
  current.value = withNode(rest, node);
  began.add(node.id);
  const growing = begin(id, node.id, stored ? "requested" : "no");
  rename("chat", id);
  // Save the question first, so that it survives a failed answer.
  trackAnswered(current.value);
  await save(current.value);
  const body = requestBody(latest(id)!, messages, chosen, anyway);
  if (stored) {
    await generate(growing, `/v1/conversations/${id}/generations`, {
      ...body, parent: question, message: node.id,
    }); // prettier-ignore
  } else {
    await collect(growing, streamChat({ ...body, stream: true }, growing.abort.signal));
  }
  const { content, reasoning } = latest(id)!.nodes.find((each) => each.id === node.id) ?? node;
  if (!content && !reasoning) {
    // Without an answer, select the previous answer or the question, which can be retried.
    const rest = without(latest(id)!, node.id);
    const exists = rest.nodes.some((each) => each.id === previous);
    setState({ ...rest, selected: exists ? previous : question });
  }
  end(growing);
  if (!stored || (!content && !reasoning)) await save(latest(id)!);
}

/** Answers that this window has asked for. */
const began = new Set<string>();

/** Continue an answer that was stopped, was interrupted or has reached its length. */
export async function continueAnswer(node: Node): Promise<void> {
  if (!canGenerate.value) return;
  const { id } = current.value;
  trackAnswered(current.value);
  const growing = begin(id, node.id, "requested");
  await generate(growing, `/v1/generations/${node.id}/continue`);
  end(growing);
}

/**
 * Show the answers of an open conversation that the server is generating, for this window or for
 * another one, and what it knows of the others.
 */
export async function attach(id: string): Promise<void> {
  if (!features.value.generations || latest(id) === null) return;
  let generations: Generation[];
  try {
    const page = await getJson<{ data: Generation[] }>(`/v1/conversations/${id}/generations?limit=100`);
    generations = page.data;
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 404)) problem.value = explain(error);
    return; // a new conversation, or one deleted elsewhere
  }
  for (const each of generations) {
    note(each.id, each);
    const state = latest(id);
    const isGrowing = each.state === "queued" || each.state === "running";
    if (!isGrowing || running.value.has(each.id)) continue;
    if (!state?.nodes.some((node) => node.id === each.id)) continue;
    trackAnswered(state);
    const growing = begin(id, each.id, "yes");
    void follow(growing).then(() => end(growing));
  }
}

/** Load what other windows have changed in the open conversation: their messages and answers. */
export async function refreshOpen(): Promise<void> {
  const { id, revision } = current.value;
  if (!features.value.generations || revision === undefined) return;
  if (await reload(id)) {
    const state = current.value;
    const { selected } = state;
    if (state.id === id && selected !== null && !generating.value) {
      current.value = { ...state, selected: leafBelow(state, selected) };
    }
  }
  if (current.value.id === id) await attach(id);
}

function begin(conversation: string, node: string, stored: Running["stored"]): Running {
  const growing: Running = {
    conversation, node, stored, abort: new AbortController(), stopping: false,
    startedAt: performance.now(), firstTokenAt: null,
  }; // prettier-ignore
  batch(() => {
    if (current.value.id === conversation) problem.value = null;
    running.value = new Map(running.value).set(node, growing);
    announcement.value = t("generating");
  });
  return growing;
}

function end(growing: Running): void {
  batch(() => {
    const rest = new Map(running.value);
    rest.delete(growing.node);
    running.value = rest;
    announcement.value = t("generationComplete");
  });
}

/** Have the server generate, and follow it. */
async function generate(growing: Running, url: string, body?: unknown): Promise<void> {
  try {
    await sendJson("POST", url, body);
  } catch (error) {
    // The response may be lost, not the request.
    const isGenerating = error instanceof Unreachable && (await exists(growing.node));
    if (!isGenerating) {
      if (current.value.id === growing.conversation) problem.value ??= explain(error);
      return;
    }
  }
  growing.stored = "yes";
  if (growing.stopping) void stopAnswer(growing);
  await follow(growing);
}

async function exists(generation: string): Promise<boolean> {
  try {
    await getJson(`/v1/generations/${generation}`);
    return true;
  } catch {
    return false;
  }
}

const RETRY_INTERVAL = 1500; // ms

/** Show a stored answer as it grows, also over lost connections and restarts of the server. */
async function follow(growing: Running): Promise<void> {
  const { conversation, node, abort } = growing;
  while (!(await collect(growing, streamGeneration(node, abort.signal)))) {
    if (abort.signal.aborted) return;
    await new Promise((resolve) => {
      addEventListener("online", resolve, { once: true });
      setTimeout(resolve, RETRY_INTERVAL);
    });
  }
  if (!abort.signal.aborted) await reload(conversation);
}

/** The stored state of a conversation, merged into this window's; false if that fails. */
async function reload(id: string): Promise<boolean> {
  try {
    await saved(); // so that what is being saved is read
    const stored = validateConversation(await conversationStorage().get(id));
    const local = latest(id);
    if (local !== null) setState(merge(local, stored));
  } catch {
    return false; // it stays as it is in this window
  }
  await refreshList().catch(() => undefined);
  return true;
}

/** A thought has ended. One that another window started is shown at once, in no time of its own. */
function noteThought({ conversation, node, stored, firstTokenAt }: Running, text: string): void {
  if (stored === "yes" && !began.has(node)) return;
  const seconds = (performance.now() - (firstTokenAt ?? performance.now())) / 1000;
  const set = (tokens: number | null) => (thoughts.value = new Map(thoughts.value).set(node, { seconds, tokens }));
  set(null);
  const chosen = latest(conversation)?.nodes.find((each) => each.id === node)?.model;
  if (chosen) void countText(chosen, text).then(set, () => undefined); // the number is optional
}

function note(node: string, { usage: tokens, timings, can_continue }: Partial<Generation>): void {
  if (tokens) {
    const seconds = timings?.generation_seconds ?? 0;
    usage.value = new Map(usage.value).set(node, { usage: tokens, seconds });
  }
  const rest = new Set(continuable.value);
  if (can_continue) rest.add(node);
  else rest.delete(node);
  continuable.value = rest;
}

/**
 * Show the chunks of an answer. False if a stored one has to be followed again: it is shown from its
 * beginning, since a server that was killed may have lost the last half second of it.
 */
async function collect(growing: Running, chunks: AsyncIterable<Chunk>): Promise<boolean> {
  const { conversation: id, node, abort, startedAt, stored } = growing;
  // Generation continues in the background if the user opens another conversation.
  const isVisible = () => current.value.id === id;
  let frame = 0;
  let content = "";
  let reasoning = "";
  let rest: Partial<Node> = stored === "no" ? {} : { finish_reason: null };
  const draw = () => {
    frame = 0;
    const state = latest(id);
    const change = { content, reasoning: reasoning || null, ...rest };
    if (state) setState(updateNode(state, node, change));
  };
  try {
    for await (const chunk of chunks) {
      if (problem.value === t("reconnecting") && isVisible()) problem.value = null;
      if (chunk.retrieval) {
        const knowledge_base = chunk.retrieval.knowledge_base ?? latest(id)?.knowledge_base ?? null;
        rest = { ...rest, retrieval: { ...chunk.retrieval, knowledge_base } };
      }
      if (chunk.warning) {
        const asked = latest(id)?.nodes.find((each) => each.id === node)?.model;
        warnOfLanguage(id, chunk.warning, asked ?? "");
      }
      if (chunk.left_out !== undefined) rest = { ...rest, left_out: chunk.left_out };
      if (chunk.timings) note(node, chunk as Partial<Generation>);
      else if (chunk.usage) {
        const seconds = (performance.now() - (growing.firstTokenAt ?? startedAt)) / 1000;
        usage.value = new Map(usage.value).set(node, { usage: chunk.usage, seconds });
      }
      for (const { delta, finish_reason } of chunk.choices) {
        if (delta.content || delta.reasoning_content) growing.firstTokenAt ??= performance.now();
        if (reasoning && !content && delta.content) noteThought(growing, reasoning);
        content += delta.content ?? "";
        reasoning += delta.reasoning_content ?? "";
        if (delta.citations) rest = { ...rest, citations: delta.citations };
        if (finish_reason) rest = { ...rest, finish_reason };
      }
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    cancelAnimationFrame(frame);
    if (stored === "no" && abort.signal.aborted) rest = { ...rest, finish_reason: "stopped" };
    else if (abort.signal.aborted) return true;
    else if (stored !== "no" && isTemporary(error)) {
      if (isVisible()) problem.value = t("reconnecting");
      return false;
    } else {
      rest = { ...rest, finish_reason: "error" };
      if (isVisible()) problem.value = explain(error);
    }
  }
  cancelAnimationFrame(frame);
  draw();
  return true;
}

/** The server can't be reached, or not yet. */
function isTemporary(error: unknown): boolean {
  return error instanceof Unreachable || (error instanceof ApiError && error.code === null && error.status >= 502);
}

function requestBody(conversation: Conversation, messages: Node[], model: ModelCard, anyway: boolean) {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  return {
    model: model.id,
    // Without the thoughts of earlier answers.
    messages: [...system, ...messages.map(({ role, content }) => ({ role, content }))],
    truncation: "auto",
    stream_options: { include_usage: true },
    ...requestSettings(model, conversation.settings),
    ...(conversation.knowledge_base ? { knowledge_base: conversation.knowledge_base } : {}),
    ...(conversation.knowledge_base && anyway ? { retrieval: { ask_anyway: true } } : {}),
  };
}
