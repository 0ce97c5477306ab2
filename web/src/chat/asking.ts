/** Questions are sent, and answers come. */

import { batch } from "@preact/signals";
import { streamChat } from "../api";
import { t } from "../i18n";
import { rename } from "../router";
import {
  changed,
  isEmpty,
  newNode,
  path,
  titleOf,
  withNode,
  without,
  type Conversation,
  type Node,
} from "../tree";
import { answeredHere, keep, newest, renew } from "./keeping";
import { current, explain, free, model, problem, running, said, usage } from "./state";

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
  answeredHere(current.value);
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
