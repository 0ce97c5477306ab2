/** Answers to rank: sampled in one request and shown in random order. */

import { batch, signal } from "@preact/signals";
import { getJson, request, sendJson, streamChat } from "../api";
import { explain, model, models } from "../chat/state";
import { t } from "../i18n";
import { add, isComplete, rankedAnswers, type Ranking } from "./ranking";

export interface Answer {
  text: string;
  finish: string | null;
  models: string[]; // several where models gave the same text; not shown before the ranking is saved
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
  models: string[];
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

/** Models whose answers are ranked; empty: the selected one. */
export const compared = signal<string[]>([]);
const ANNOTATOR_KEY = "khaosz.annotator";
export const annotator = signal(localStorage.getItem(ANNOTATOR_KEY) ?? "");

export function setAnnotator(name: string): void {
  annotator.value = name;
  localStorage.setItem(ANNOTATOR_KEY, name.trim());
}

/** Of a file of prompts: how many it has, and how many were ranked and skipped here, in how long. */
export const progress = signal({ total: 0, ranked: 0, skipped: 0, seconds: 0 });
let shownAt = 0;

export function progressText(): string {
  const { total, ranked, skipped, seconds } = progress.value;
  const done = ranked + skipped;
  const at = t("rankProgress", { n: Math.min(done + 1, total), total, skipped });
  if (!done) return at;
  return `${at}${t("rankTimeLeft", { n: Math.max(1, Math.round(((seconds / done) * (total - done)) / 60)) })}`;
}

function countDone(kind: "ranked" | "skipped"): void {
  const seconds = progress.value.seconds + (performance.now() - shownAt) / 1000;
  progress.value = { ...progress.value, [kind]: progress.value[kind] + 1, seconds };
}

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
  const known = models.value.filter((each) => each.kind === "chat").map((each) => each.id);
  const several = compared.value.filter((id) => known.includes(id));
  const chosen = several.length ? several : model.value ? [model.value.id] : [];
  if (!chosen.length || !prompt.value.trim()) return;
  cancelRound();
  const controller = new AbortController();
  abort = controller;
  const { n, ...settings } = sampling.value;
  // Annotators with a name rank the same answers to the same prompt.
  const text = JSON.stringify([system.value.trim(), prompt.value.trim()]);
  const seed = annotator.value.trim() ? hashed(text) : crypto.getRandomValues(new Uint32Array(1))[0]! >>> 1;
  const order = shuffled(n * chosen.length);
  const answers: Answer[] = order.map(() => ({ text: "", finish: null, models: [] }));
  const started: Round = {
    prompt: prompt.value.trim(),
    system: system.value.trim(),
    models: chosen,
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
    for (const [i, id] of chosen.entries()) {
      const body = { model: id, messages: messagesOf(started), n, seed, ...settings, stream: true };
      for await (const chunk of streamChat(body, controller.signal)) {
        for (const { index, delta, finish_reason } of chunk.choices) {
          const answer = answers[order[i * n + index]!]!;
          answer.models = [id];
          answer.text += delta.content ?? "";
          if (finish_reason) answer.finish = finish_reason;
        }
        // The speed of an answer, and which ones grow together, would tell the models apart.
        if (chosen.length === 1) frame ||= requestAnimationFrame(draw);
      }
      status.value = t("answersReady", { n: (i + 1) * n, total: n * chosen.length });
    }
  } catch (error) {
    cancelAnimationFrame(frame);
    if (controller.signal.aborted || abort !== controller) return;
    fail(explain(error));
    return;
  }
  cancelAnimationFrame(frame);
  if (abort !== controller) return;
  const different: Answer[] = [];
  for (const answer of answers.filter(({ text }) => text.trim())) {
    const same = different.find((each) => each.text === answer.text);
    if (same) same.models = [...new Set([...same.models, ...answer.models])];
    else different.push({ ...answer });
  }
  if (different.length < 2) {
    fail(t("identicalAnswers"));
    return;
  }
  batch(() => {
    shownAt = performance.now();
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

/** FNV-1a, 31 bits. */
function hashed(text: string): number {
  let hash = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) hash = Math.imul(hash ^ byte, 0x01000193);
  return hash >>> 1;
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
  const source = (id: string) => ({ model: id, seed: done.seed, sampling: settings });
  const by = rankedAnswers(ranking.value).map((i) => done.answers[i]!.models.map(source));
  const from =
    done.models.length > 1
      ? { sources: by }
      : { model: done.models[0], seed: done.seed, sampling: settings };
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
        ...(annotator.value.trim() ? { annotator: annotator.value.trim() } : {}),
        ...from,
      },
    );
    countDone("ranked");
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
  countDone("skipped");
  nextRound(done);
}

/** Take the last saved ranking of this annotator back, and show its prompt. */
export async function takeBack(): Promise<void> {
  const by = annotator.value.trim();
  const name = by ? `?annotator=${encodeURIComponent(by)}` : "";
  try {
    const path = `/v1/preferences/last${name}`;
    const { messages, count: total } = await sendJson<Taken>("DELETE", path);
    const text = (role: string) => messages.findLast((each) => each.role === role)?.content ?? "";
    if (prompt.value.trim()) promptQueue.value = [prompt.value, ...promptQueue.value];
    cancelRound();
    batch(() => {
      count.value = total;
      prompt.value = text("user");
      system.value = text("system");
      progress.value = { ...progress.value, ranked: Math.max(0, progress.value.ranked - 1) };
      status.value = t("takenBack");
      problem.value = null;
    });
  } catch (error) {
    problem.value = explain(error);
  }
}

interface Taken {
  messages: { role: string; content: string }[];
  count: number;
}

export interface Agreement {
  annotators: Record<string, number>;
  shared_items: number;
  alpha: number | null;
  alpha_interval: [number, number] | null;
  models: { model: string; comparisons: number; rate: number; score: number | null }[];
  disputed: number;
  disputes: { id: string; prompt: { content: string }[]; discordance: number }[];
}

export const agreement = signal<Agreement | null>(null);

export async function loadAgreement(): Promise<void> {
  try {
    agreement.value = await getJson<Agreement>("/v1/preferences/agreement");
  } catch (error) {
    problem.value = explain(error);
  }
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
