/** Training runs, with details of the selected ones. */

import { signal } from "@preact/signals";
import { ApiError, getJson } from "../api";
import { explain } from "../chat/state";
import { appendRows, type Row } from "./series";

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

/** Metrics, samples and configuration of a selected run. */
export interface Detail {
  rows: Row[];
  samples: Sample[];
  config: Config;
  updated: number; // `updated` of the run when this was fetched
  complete: boolean; // the run has ended, and two fetches agreed
}

export const MAX_RUNS = 6; // in one chart
const MAX_ROWS = 5000; // then all rows are fetched again, thinned by the server

export const runs = signal<Run[] | null>(null); // null: not fetched yet
/** By run. A map, since a run may be called `constructor`. */
export const details = signal<ReadonlyMap<string, Detail>>(new Map());
export const problem = signal<string | null>(null);

function url(id: string, resource: string): string {
  return `/v1/runs/${id.split("/").map(encodeURIComponent).join("/")}/${resource}`;
}

export async function refreshRuns(): Promise<void> {
  try {
    runs.value = (await getJson<{ data: Run[] }>("/v1/runs")).data;
    problem.value = null;
  } catch (error) {
    problem.value = explain(error);
  }
}

/** Fetch what is new of these runs, and everything of runs selected for the first time. */
export async function refreshDetails(ids: string[]): Promise<void> {
  try {
    const entries = await Promise.all(ids.map(async (id) => [id, await fetchDetail(id)] as const));
    details.value = new Map(entries.flatMap(([id, detail]) => (detail === null ? [] : [[id, detail]])));
    problem.value = null;
  } catch (error) {
    problem.value = explain(error);
  }
}

async function fetchDetail(id: string, fromStart = false): Promise<Detail | null> {
  const before = fromStart ? undefined : details.value.get(id);
  const run = runs.value?.find((each) => each.id === id);
  // `updated` is in whole seconds, and more may be written within one: an ended run is fetched until
  // two fetches agree.
  const unchanged = before !== undefined && before.updated === run?.updated && run.state !== "running";
  if (unchanged && before.complete) return before;
  const known = before && before.rows.length < MAX_ROWS ? before : null;
  const lastOf = (rows: { step?: unknown }[] | undefined) => Number(rows?.at(-1)?.step ?? 0);
  const [lastRow, lastSample] = [lastOf(known?.rows), lastOf(known?.samples)];
  // Include the last known step: its row shows whether this is still the same run, and its samples
  // are written one by one.
  const after = (step: number) => `after=${Math.max(0, step - 1)}`;
  try {
    const [metrics, samples, config] = await Promise.all([
      getJson<{ rows: Row[] }>(url(id, `metrics?${after(lastRow)}`)),
      getJson<{ data: Sample[] }>(url(id, `samples?${after(lastSample)}`)),
      known?.config.plan ? known.config : getJson<Config>(url(id, "config")),
    ]);
    const row = metrics.rows.findLast((row) => row.step === lastRow);
    if (lastRow && JSON.stringify(row) !== JSON.stringify(known?.rows.at(-1))) {
      // The run was restarted and may have passed this step: discard what is known.
      return await fetchDetail(id, true);
    }
    return {
      rows: known ? appendRows(known.rows, metrics.rows) : metrics.rows,
      samples: [...(known?.samples ?? []).filter(({ step }) => step < lastSample), ...samples.data],
      config,
      updated: run?.updated ?? 0,
      complete: unchanged,
    };
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null; // deleted
    throw error;
  }
}
