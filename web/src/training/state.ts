/** Training runs as the server tells of them, and those that are looked at. */

import { signal } from "@preact/signals";
import { ApiError, getJson } from "../api";
import { explain } from "../chat/state";
import { joined, type Row } from "./series";

export interface Run {
  id: string;
  stage: string | null;
  state: "running" | "finished" | "stopped" | "unknown";
  step: number | null;
  steps: number | null;
  updated: number;
  last: Row;
  curve: (number | null)[];
}

export interface Sample {
  step: number;
  prompt: string;
  text: string;
  reward?: number | null;
}

export interface Config {
  config: Record<string, unknown> | null;
  plan: Record<string, unknown> | null;
}

/** What is known of a run that is looked at. */
export interface Detail {
  rows: Row[];
  samples: Sample[];
  config: Config;
  updated: number; // the run's, when it was looked at
  still: boolean; // nothing more is to come
}

export const MOST = 6; // runs in one chart
const MANY = 5000; // rows, then they are fetched thinned again

export const runs = signal<Run[] | null>(null); // null: not asked yet
export const details = signal<Record<string, Detail>>({});
export const trouble = signal<string | null>(null);

function where(id: string, what: string): string {
  return `/v1/runs/${id.split("/").map(encodeURIComponent).join("/")}/${what}`;
}

export async function refreshRuns(): Promise<void> {
  try {
    runs.value = (await getJson<{ data: Run[] }>("/v1/runs")).data;
    trouble.value = null;
  } catch (error) {
    trouble.value = explain(error);
  }
}

/** What is new of these runs; all of a run that was not looked at before. */
export async function follow(ids: string[]): Promise<void> {
  try {
    const found = await Promise.all(ids.map(async (id) => [id, await newest(id)] as const));
    details.value = Object.fromEntries(found.filter((each) => each[1] !== null)) as typeof details.value;
    trouble.value = null;
  } catch (error) {
    trouble.value = explain(error);
  }
}

async function newest(id: string, anew = false): Promise<Detail | null> {
  const before = anew ? undefined : details.value[id];
  const run = runs.value?.find((each) => each.id === id);
  // `updated` is a whole second, in which more may be written: a run that has ended is looked at
  // until two looks agree.
  const same = before !== undefined && before.updated === run?.updated && run.state !== "running";
  if (same && before.still) return before;
  const known = before && before.rows.length < MANY ? before : null;
  const lastOf = (rows: { step?: unknown }[] | undefined) => Number(rows?.at(-1)?.step ?? 0);
  const [from, sampled] = [lastOf(known?.rows), lastOf(known?.samples)];
  // The last step once more: its row tells whether this is still the same run, and its samples are
  // written one after the other.
  const after = (step: number) => `after=${Math.max(0, step - 1)}`;
  try {
    const [metrics, samples, config] = await Promise.all([
      getJson<{ rows: Row[] }>(where(id, `metrics?${after(from)}`)),
      getJson<{ data: Sample[] }>(where(id, `samples?${after(sampled)}`)),
      known?.config.plan ? known.config : getJson<Config>(where(id, "config")),
    ]);
    const again = metrics.rows.findLast((row) => row.step === from);
    if (from && JSON.stringify(again) !== JSON.stringify(known?.rows.at(-1))) {
      // It was begun again, and may be further on by now: what is known is no longer so.
      return await newest(id, true);
    }
    return {
      rows: known ? joined(known.rows, metrics.rows) : metrics.rows,
      samples: [...(known?.samples ?? []).filter(({ step }) => step < sampled), ...samples.data],
      config,
      updated: run?.updated ?? 0,
      still: same,
    };
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null; // deleted meanwhile
    throw error;
  }
}
