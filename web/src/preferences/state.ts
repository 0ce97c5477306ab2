/** Answers to rank: sampled in one request and shown in random order. */

import { batch, computed, signal } from "@preact/signals";
import { getJson, request, sendJson, streamChat } from "../api";
import { explain, model, models } from "../chat/state";
import { t } from "../i18n";
import { add, isComplete, rankedAnswers, type Ranking } from "./ranking";

export interface Answer {
  text: string;
  finish: string | null;
  id: string | null; // of answers that the server drew: it alone knows their models
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
  drawn: string | null; // the id of answers that the server drew
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

/** Names of models of other servers. */
export const peers = signal<string[]>([]);
/** What can be compared: the models here, and those. */
export const comparable = computed(() => [
  ...new Set([...models.value.filter((each) => each.kind === "chat").map((each) => each.id), ...peers.value]),
]);
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
    const summary = await getJson<{ count: number; file: string; peers: string[] }>("/v1/preferences");
    batch(() => {
      count.value = summary.count;
      file.value = summary.file;
      peers.value = summary.peers;
    });
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
  const several = compared.value.filter((id) => comparable.value.includes(id));
  const name = annotator.value.trim();
  const chosen = several.length ? several : model.value ? [model.value.id] : [];
  if (!chosen.length || !prompt.value.trim()) return;
  cancelRound();
  const controller = new AbortController();
  abort = controller;
  const started: Round = {
    prompt: prompt.value.trim(),
    system: system.value.trim(),
    model: chosen[0]!,
    drawn: null,
    seed: crypto.getRandomValues(new Uint32Array(1))[0]! >>> 1,
    sampling: sampling.value,
    answers: Array.from({ length: sampling.value.n * chosen.length }, () => ({ text: "", finish: null, id: null })),
    sampled: false,
  };
  batch(() => {
    problem.value = null;
    status.value = t("generating");
    round.value = started;
  });
  try {
    // Of several models, or for an annotator with a name, the server draws and keeps the answers:
    // it hides the models, and annotators rank the very same answers.
    const shared = several.length > 0 || name;
    await (shared ? draw(started, chosen, name, controller) : sampleHere(started, controller));
  } catch (error) {
    if (!controller.signal.aborted && abort === controller) fail(explain(error));
  }
}

async function sampleHere(started: Round, controller: AbortController): Promise<void> {
  const { n, ...settings } = started.sampling;
  const order = shuffled(n);
  const answers = started.answers.map((each) => ({ ...each }));
  let frame = 0;
  const show = () => {
    frame = 0;
    if (abort === controller) round.value = { ...started, answers: answers.map((each) => ({ ...each })) };
  };
  const body = { model: started.model, messages: messagesOf(started), n, seed: started.seed, ...settings, stream: true };
  try {
    for await (const chunk of streamChat(body, controller.signal)) {
      for (const { index, delta, finish_reason } of chunk.choices) {
        const answer = answers[order[index]!]!;
        answer.text += delta.content ?? "";
        if (finish_reason) answer.finish = finish_reason;
      }
      frame ||= requestAnimationFrame(show);
    }
  } finally {
    cancelAnimationFrame(frame);
  }
  if (abort === controller) showAll(started, answers);
}

interface Drawn {
  id: string;
  done: boolean;
  ready: number;
  total: number;
  answers: { id: string; text: string; finish_reason: string }[];
  problems: string[];
}

const POLL_MS = 400;

async function draw(started: Round, chosen: string[], name: string, controller: AbortController): Promise<void> {
  const { n, ...settings } = started.sampling;
  const body = {
    messages: messagesOf(started),
    models: chosen,
    n,
    sampling: settings,
    ...(name ? { annotator: name } : {}),
  };
  for (;;) {
    const drawn = await sendJson<Drawn>("POST", "/v1/preferences/answers", body, controller.signal);
    if (abort !== controller) return;
    if (drawn.done) {
      const answers = drawn.answers.map(({ id, text, finish_reason }) => ({ id, text, finish: finish_reason }));
      if (answers.length < 2 && drawn.problems.length) fail(drawn.problems.join("\n"));
      else {
        problem.value = drawn.problems.join("\n") || null;
        showAll({ ...started, drawn: drawn.id }, answers);
      }
      return;
    }
    status.value = t("answersReady", { n: drawn.ready, total: drawn.total });
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (abort !== controller) return;
  }
}

function showAll(started: Round, answers: Answer[]): void {
  const different = answers.filter(
    ({ text }, i) => text.trim() && answers.findIndex((each) => each.text === text) === i,
  );
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

function messagesOf(round: { prompt: string; system: string }): { role: string; content: string }[] {
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
  saving = true;
  try {
    const { pairs, count: total } = await sendJson<{ pairs: number; count: number }>("POST", ...rankingOf(done));
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

/** Path and body of the request that stores the ranking of a round. */
function rankingOf(done: Round): [string, unknown] {
  const name = annotator.value.trim();
  const by = name ? { annotator: name } : {};
  const ranked = (of: (answer: Answer) => string) => {
    const levels = ranking.value.map((level) => level.map((i) => of(done.answers[i]!)));
    return levels.map((level) => (level.length === 1 ? level[0] : level));
  };
  if (done.drawn !== null)
    return [`/v1/preferences/answers/${done.drawn}/ranking`, { ranked: ranked((each) => each.id!), ...by }];
  const { n: _, ...settings } = done.sampling;
  const finishes = rankedAnswers(ranking.value).map((i) => done.answers[i]!.finish);
  const body = {
    messages: messagesOf(done),
    ranked: ranked((each) => each.text),
    finish_reasons: finishes.includes(null) ? null : finishes,
    model: done.model,
    seed: done.seed,
    sampling: settings,
    ...by,
  };
  return ["/v1/preferences", body];
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

/** Begin a file of prompts, without those that this annotator has ranked already. */
export async function startPrompts(prompts: string[]): Promise<void> {
  const left = await unranked(prompts);
  batch(() => {
    cancelRound();
    prompt.value = "";
    promptQueue.value = left;
    progress.value = { total: left.length, ranked: 0, skipped: 0, seconds: 0 };
    status.value = left.length < prompts.length ? t("alreadyRanked", { n: prompts.length - left.length }) : "";
    takeNext();
  });
}

/** Another annotator: the prompts that follow are those that are left for that one. */
export async function changeAnnotator(): Promise<void> {
  const queue = promptQueue.value;
  const waits = round.value === null && progress.value.total > 0 && prompt.value.trim() !== "";
  const all = waits ? [prompt.value, ...queue] : queue;
  const left = await unranked(all);
  if (promptQueue.value !== queue || left.length === all.length) return;
  batch(() => {
    promptQueue.value = left;
    progress.value = { ...progress.value, total: progress.value.total - all.length + left.length };
    status.value = t("alreadyRanked", { n: all.length - left.length });
    if (!waits) return;
    prompt.value = "";
    takeNext();
  });
}

async function unranked(prompts: string[]): Promise<string[]> {
  if (!prompts.length) return prompts;
  const name = annotator.value.trim();
  const asked = prompts.map((each) => messagesOf({ prompt: each.trim(), system: system.value.trim() }));
  try {
    const path = "/v1/preferences/ranked";
    const body = { prompts: asked, ...(name ? { annotator: name } : {}) };
    const { ranked } = await sendJson<{ ranked: boolean[] }>("POST", path, body);
    return prompts.filter((_, i) => !ranked[i]);
  } catch (error) {
    problem.value = explain(error);
    return prompts;
  }
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
