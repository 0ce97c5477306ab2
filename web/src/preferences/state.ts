/** Answers to rank: sampled in one request and shown in random order. */

import { batch, signal } from "@preact/signals";
import { getJson, request, sendJson, streamChat } from "../api";
import { explain, model } from "../chat/state";
import { t } from "../i18n";
import { add, isComplete, rankedAnswers, type Ranking } from "./ranking";

export interface Answer {
  text: string;
  finish: string | null;
}

export interface Sampling {
  n: number;
  temperature: number;
  max_tokens: number;
}

/** The prompt being ranked, as it was sent, with its settings and answers. */
export interface Round {
  prompt: string;
  system: string;
  model: string;
  seed: number;
  sampling: Sampling;
  answers: Answer[];
  sampled: boolean; // all answers are complete
}

export const prompt = signal("");
export const system = signal("");
export const sampling = signal<Sampling>({ n: 4, temperature: 0.9, max_tokens: 256 });
export const promptQueue = signal<string[]>([]); // prompts of a file
export const round = signal<Round | null>(null);
export const ranking = signal<Ranking>([]);
export const tied = signal(false); // rank the next answer tied with the last
export const count = signal<number | null>(null);
export const file = signal("preferences.jsonl");
export const problem = signal<string | null>(null);
export const status = signal("");

let abort: AbortController | null = null;
let saving = false; // pressing Enter twice saves once

export async function refreshCount(): Promise<void> {
  try {
    const summary = await getJson<{ count: number; file: string }>("/v1/preferences");
    count.value = summary.count;
    file.value = summary.file;
  } catch (error) {
    problem.value = explain(error);
  }
}

export function cancelRound(): void {
  abort?.abort();
  abort = null;
  batch(() => {
    round.value = null;
    ranking.value = [];
    tied.value = false;
  });
}

export async function sample(): Promise<void> {
  const chosen = model.value;
  if (chosen === null || !prompt.value.trim()) return;
  cancelRound();
  const controller = new AbortController();
  abort = controller;
  const { n, ...settings } = sampling.value;
  const seed = crypto.getRandomValues(new Uint32Array(1))[0]! >>> 1;
  const order = shuffled(n);
  const answers: Answer[] = order.map(() => ({ text: "", finish: null }));
  const started: Round = {
    prompt: prompt.value.trim(),
    system: system.value.trim(),
    model: chosen.id,
    seed,
    sampling: sampling.value,
    answers,
    sampled: false,
  };
  batch(() => {
    problem.value = null;
    status.value = t("generating");
    round.value = started;
  });
  let frame = 0;
  const draw = () => {
    frame = 0;
    if (abort === controller) round.value = { ...started, answers: answers.map((each) => ({ ...each })) };
  };
  try {
    const body = { model: chosen.id, messages: messagesOf(started), n, seed, ...settings, stream: true };
    for await (const chunk of streamChat(body, controller.signal)) {
      for (const { index, delta, finish_reason } of chunk.choices) {
        const answer = answers[order[index]!]!;
        answer.text += delta.content ?? "";
        if (finish_reason) answer.finish = finish_reason;
      }
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    cancelAnimationFrame(frame);
    if (controller.signal.aborted || abort !== controller) return;
    fail(explain(error));
    return;
  }
  cancelAnimationFrame(frame);
  if (abort !== controller) return;
  const different = answers.filter(
    ({ text }, i) => text.trim() && answers.findIndex((each) => each.text === text) === i,
  );
  if (different.length < 2) {
    fail(t("identicalAnswers"));
    return;
  }
  batch(() => {
    round.value = { ...started, answers: different, sampled: true };
    status.value = t("generationComplete");
  });
}

function fail(message: string): void {
  cancelRound();
  batch(() => {
    status.value = ""; // no longer generating
    problem.value = message;
  });
}

function messagesOf(round: Round): { role: string; content: string }[] {
  const system = round.system ? [{ role: "system", content: round.system }] : [];
  return [...system, { role: "user", content: round.prompt }];
}

function shuffled(n: number): number[] {
  const order = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = crypto.getRandomValues(new Uint32Array(1))[0]! % (i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}

export function rankNext(answer: number): void {
  const { value: active } = round;
  if (!active?.sampled || answer >= active.answers.length) return;
  ranking.value = add(ranking.value, answer, active.answers.length, tied.value);
  tied.value = false;
}

export async function save(): Promise<void> {
  const done = round.value;
  if (!done || saving || !isComplete(ranking.value, done.answers.length)) return;
  const { n: _, ...settings } = done.sampling;
  const finishes = rankedAnswers(ranking.value).map((i) => done.answers[i]!.finish);
  const levels = ranking.value.map((level) => level.map((i) => done.answers[i]!.text));
  saving = true;
  try {
    const { pairs, count: total } = await sendJson<{ pairs: number; count: number }>(
      "POST",
      "/v1/preferences",
      {
        messages: messagesOf(done),
        ranked: levels.map((level) => (level.length === 1 ? level[0] : level)),
        finish_reasons: finishes.includes(null) ? null : finishes,
        model: done.model,
        seed: done.seed,
        sampling: settings,
      },
    );
    batch(() => {
      count.value = total;
      status.value = t("rankingSaved", { n: pairs });
      problem.value = null;
    });
  } catch (error) {
    problem.value = explain(error);
    return;
  } finally {
    saving = false;
  }
  if (round.value === done) nextRound(done); // else the user has already continued
}

export function skip(): void {
  const { value: done } = round;
  if (done === null) return;
  status.value = t("skipped");
  nextRound(done);
}

/** Continue with the next prompt of the file, unless the user has already entered another one. */
function nextRound(done: Round): void {
  cancelRound();
  if (prompt.value.trim() !== done.prompt) return;
  prompt.value = "";
  if (takeNext()) void sample();
}

export function takeNext(): boolean {
  const [next, ...rest] = promptQueue.value;
  if (next === undefined) return false;
  batch(() => {
    prompt.value = next;
    promptQueue.value = rest;
  });
  return true;
}

/** By a request rather than a link, which would not send the API key. */
export async function download(): Promise<void> {
  try {
    const response = await request("/v1/preferences/export");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = file.value;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  } catch (error) {
    problem.value = explain(error);
  }
}
