/** The catalogue of models, and those that are being fetched. */

import { signal } from "@preact/signals";
import { ApiError, getJson, sendJson, type Catalogue, type CatalogueEntry, type Pull } from "../api";
import { explain, models, refreshModels, selectModel } from "../chat/state";
import { go, route } from "../router";

export const catalogue = signal<Catalogue | null>(null);
export const problem = signal<string | null>(null);
/** By the model's name, as the server last told. */
export const pulls = signal<ReadonlyMap<string, Pull>>(new Map());

const INTERVAL = 700; // ms between two looks at a pull
/** Started by a click in this window: the chat opens when it is there. */
const clicked = new Set<string>();
let timer: ReturnType<typeof setTimeout> | undefined;

const pathOf = (name: string) => `/v1/catalogue/${name.split("/").map(encodeURIComponent).join("/")}/pull`;

function setPull(name: string, pull: Pull | null): void {
  const all = new Map(pulls.value);
  if (pull === null) all.delete(name);
  else all.set(name, pull);
  pulls.value = all;
}

export async function refreshCatalogue(): Promise<void> {
  try {
    const reply = await getJson<Catalogue>("/v1/catalogue");
    catalogue.value = reply;
    pulls.value = new Map(reply.data.flatMap(({ name, pull }) => (pull ? [[name, pull] as const] : [])));
    problem.value = null;
    watch();
  } catch (error) {
    problem.value = explain(error);
  }
}

/** Serve a model, which is fetched first unless it is here. */
export async function start(entry: CatalogueEntry, accepted: boolean): Promise<void> {
  problem.value = null;
  try {
    clicked.add(entry.name);
    setPull(entry.name, await sendJson<Pull>("POST", pathOf(entry.name), { accept_licence: accepted }));
    watch();
  } catch (error) {
    clicked.delete(entry.name);
    problem.value = explain(error);
  }
}

/** Cancel a pull, or dismiss how it ended. discard: remove what has arrived, too. */
export async function cancel(name: string, discard = false): Promise<void> {
  clicked.delete(name);
  try {
    await sendJson("DELETE", `${pathOf(name)}${discard ? "?discard=true" : ""}`);
  } catch (error) {
    problem.value = explain(error);
  }
  setPull(name, null);
  await refreshCatalogue();
}

export function chatWith(name: string): void {
  selectModel(name);
  go("chat");
}

function watch(): void {
  clearTimeout(timer);
  if ([...pulls.value.values()].some((pull) => pull.state === "running")) timer = setTimeout(look, INTERVAL);
}

async function look(): Promise<void> {
  for (const [name, pull] of pulls.value) {
    if (pull.state !== "running") continue;
    let now: Pull;
    try {
      now = await getJson<Pull>(pathOf(name));
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) {
        await refreshCatalogue(); // the server was restarted: it can be resumed
        return;
      }
      problem.value = explain(error); // and look again: the server may be back
      continue;
    }
    problem.value = null;
    if (!pulls.value.has(name)) continue; // cancelled meanwhile
    setPull(name, now);
    if (now.state === "complete" && now.model !== null) await finished(name, now.model);
  }
  watch();
}

async function finished(name: string, model: string): Promise<void> {
  setPull(name, null);
  const isFirst = models.value.every((each) => each.kind !== "chat");
  await Promise.all([refreshModels(), refreshCatalogue()]);
  if (!clicked.delete(name) && !isFirst) return;
  selectModel(model);
  if (route.value.view === "models") go("chat");
}
