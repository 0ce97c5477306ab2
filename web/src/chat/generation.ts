/** Sending prompts and streaming answers. */

import { batch } from "@preact/signals";
import { streamChat } from "../api";
import { t } from "../i18n";
import { rename } from "../router";
import {
  isEmpty,
  newNode,
  path,
  titleOf,
  updateNode,
  withNode,
  without,
  type Conversation,
  type Node,
} from "../tree";
import { latest, save, setState, trackAnswered } from "./persistence";
import { announcement, canGenerate, current, explain, model, problem, running, usage } from "./state";

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

/** Stream an answer to the question, as a sibling of earlier answers. */
export async function answer(question: string, anyway = false): Promise<void> {
  const chosen = model.value;
  if (chosen === null || running.value !== null) return;
  const node = newNode(question, "assistant", "", chosen.id);
  const messages = path({ ...current.value, selected: question });
  const abort = new AbortController();
  const { id, selected: previous } = current.value;
  const empty = current.value.nodes.filter((each) => each.parent === question && isEmpty(each));
  batch(() => {
    problem.value = null;
    const rest = empty.reduce((left, { id }) => without(left, id), current.value);
    current.value = withNode(rest, node);
    const startedAt = performance.now();
    running.value = { conversation: id, node: node.id, abort, startedAt, firstTokenAt: null };
    announcement.value = t("generating");
  });
  rename("chat", id);
  // Save the question first, so that it survives a failed answer.
  trackAnswered(current.value);
  await save(current.value);
  const conversation = latest(id)!;
  // Generation continues in the background if the user opens another conversation.
  const isVisible = () => current.value.id === id;
  let frame = 0;
  let content = "";
  let reasoning = "";
  let rest: Partial<Node> = {};
  const draw = () => {
    frame = 0;
    const change = { content, reasoning: reasoning || null, ...rest };
    setState(updateNode(latest(id)!, node.id, change));
  };
  try {
    for await (const chunk of streamChat(requestBody(conversation, messages, chosen.id, anyway), abort.signal)) {
      if (chunk.retrieval) {
        const { knowledge_base } = conversation;
        rest = { ...rest, retrieval: { ...chunk.retrieval, knowledge_base } };
      }
      if (chunk.left_out !== undefined) rest = { ...rest, left_out: chunk.left_out };
      if (chunk.usage) {
        const { firstTokenAt, startedAt } = running.value!;
        const seconds = (performance.now() - (firstTokenAt ?? startedAt)) / 1000;
        usage.value = new Map(usage.value).set(node.id, { usage: chunk.usage, seconds });
      }
      for (const { delta, finish_reason } of chunk.choices) {
        if (delta.content || delta.reasoning_content) running.value!.firstTokenAt ??= performance.now();
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
      if (isVisible()) problem.value = explain(error);
    }
  }
  cancelAnimationFrame(frame);
  draw();
  if (!content && !reasoning) {
    // Without an answer, select the previous answer or the question, which can be retried.
    const rest = without(latest(id)!, node.id);
    const exists = rest.nodes.some((each) => each.id === previous);
    setState({ ...rest, selected: exists ? previous : question });
  }
  batch(() => {
    running.value = null;
    announcement.value = t("generationComplete");
  });
  await save(latest(id)!);
}

function requestBody(conversation: Conversation, messages: Node[], model: string, anyway: boolean): unknown {
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  return {
    model,
    messages: [...system, ...messages.map(({ role, content }) => ({ role, content }))],
    truncation: "auto",
    stream: true,
    stream_options: { include_usage: true },
    ...conversation.settings,
    ...(conversation.knowledge_base ? { knowledge_base: conversation.knowledge_base } : {}),
    ...(conversation.knowledge_base && anyway ? { retrieval: { ask_anyway: true } } : {}),
  };
}
