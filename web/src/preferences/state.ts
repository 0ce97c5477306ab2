/** Answers to rank: sampled all at once, shown in an order that tells nothing. */

import { batch, signal } from "@preact/signals";
import { getJson, request, sendJson, streamChat } from "../api";
import { explain, model } from "../chat/state";
import { t } from "../i18n";
import { add, complete, ranked, type Ranking } from "./ranking";

export interface Answer {
  text: string;
  finish: string | null;
}

export interface Sampling {
  n: number;
  temperature: number;
  max_tokens: number;
}

/** What is ranked now: the prompt as it was sent, and how. */
export interface Round {
  prompt: string;
  system: string;
  model: string;
  seed: number;
  sampling: Sampling;
  answers: Answer[];
  sampled: boolean; // all of them are there
}

export const prompt = signal("");
export const system = signal("");
export const sampling = signal<Sampling>({ n: 4, temperature: 0.9, max_tokens: 256 });
export const waiting = signal<string[]>([]); // prompts of a file
export const round = signal<Round | null>(null);
export const ranking = signal<Ranking>([]);
export const tied = signal(false); // the next one is as good as the last
export const count = signal<number | null>(null);
export const file = signal("preferences.jsonl");
export const trouble = signal<string | null>(null);
export const told = signal("");

let abort: AbortController | null = null;
let saving = false; // a second Enter is no second record

export async function refreshCount(): Promise<void> {
  try {
    const found = await getJson<{ count: number; file: string }>("/v1/preferences");
    count.value = found.count;
    file.value = found.file;
  } catch (error) {
    trouble.value = explain(error);
  }
}

export function giveUp(): void {
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
  giveUp();
  const own = new AbortController();
  abort = own;
  const { n, ...how } = sampling.value;
  const seed = crypto.getRandomValues(new Uint32Array(1))[0]! >>> 1;
  const places = shuffled(n);
  const answers: Answer[] = places.map(() => ({ text: "", finish: null }));
  const begun: Round = {
    prompt: prompt.value.trim(),
    system: system.value.trim(),
    model: chosen.id,
    seed,
    sampling: sampling.value,
    answers,
    sampled: false,
  };
  batch(() => {
    trouble.value = null;
    told.value = t("answering");
    round.value = begun;
  });
  let frame = 0;
  const draw = () => {
    frame = 0;
    if (abort === own) round.value = { ...begun, answers: answers.map((each) => ({ ...each })) };
  };
  try {
    const asked = { model: chosen.id, messages: messagesOf(begun), n, seed, ...how, stream: true };
    for await (const chunk of streamChat(asked, own.signal)) {
      for (const { index, delta, finish_reason } of chunk.choices) {
        const answer = answers[places[index]!]!;
        answer.text += delta.content ?? "";
        if (finish_reason) answer.finish = finish_reason;
      }
      frame ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    cancelAnimationFrame(frame);
    if (own.signal.aborted || abort !== own) return;
    failed(explain(error));
    return;
  }
  cancelAnimationFrame(frame);
  if (abort !== own) return;
  const different = answers.filter(
    ({ text }, i) => text.trim() && answers.findIndex((each) => each.text === text) === i,
  );
  if (different.length < 2) {
    failed(t("alike"));
    return;
  }
  batch(() => {
    round.value = { ...begun, answers: different, sampled: true };
    told.value = t("answered");
  });
}

function failed(why: string): void {
  giveUp();
  batch(() => {
    told.value = ""; // nobody is answering any more
    trouble.value = why;
  });
}

function messagesOf(given: Round): { role: string; content: string }[] {
  const before = given.system ? [{ role: "system", content: given.system }] : [];
  return [...before, { role: "user", content: given.prompt }];
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
  const at = round.value;
  if (!at?.sampled || answer >= at.answers.length) return;
  ranking.value = add(ranking.value, answer, at.answers.length, tied.value);
  tied.value = false;
}

export async function save(): Promise<void> {
  const done = round.value;
  if (!done || saving || !complete(ranking.value, done.answers.length)) return;
  const { n: _, ...how } = done.sampling;
  const finishes = ranked(ranking.value).map((i) => done.answers[i]!.finish);
  const levels = ranking.value.map((level) => level.map((i) => done.answers[i]!.text));
  saving = true;
  try {
    const { pairs, count: now } = await sendJson<{ pairs: number; count: number }>(
      "POST",
      "/v1/preferences",
      {
        messages: messagesOf(done),
        ranked: levels.map((level) => (level.length === 1 ? level[0] : level)),
        finish_reasons: finishes.includes(null) ? null : finishes,
        model: done.model,
        seed: done.seed,
        sampling: how,
      },
    );
    batch(() => {
      count.value = now;
      told.value = t("savedRanking", { n: pairs });
      trouble.value = null;
    });
  } catch (error) {
    trouble.value = explain(error);
    return;
  } finally {
    saving = false;
  }
  if (round.value === done) goOn(done); // or the user has gone on already
}

export function skip(): void {
  const { value: done } = round;
  if (done === null) return;
  told.value = t("skipped");
  goOn(done);
}

/** With the next prompt of the file, if there is one, or with what was written meanwhile. */
function goOn(done: Round): void {
  giveUp();
  if (prompt.value.trim() !== done.prompt) return;
  prompt.value = "";
  if (takeNext()) void sample();
}

export function takeNext(): boolean {
  const [next, ...rest] = waiting.value;
  if (next === undefined) return false;
  batch(() => {
    prompt.value = next;
    waiting.value = rest;
  });
  return true;
}

/** By hand rather than by a link, which would not send the key. */
export async function download(): Promise<void> {
  try {
    const response = await request("/v1/preferences/export");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await response.blob());
    link.download = file.value;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  } catch (error) {
    trouble.value = explain(error);
  }
}
