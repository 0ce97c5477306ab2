/** Where conversations are kept: with the server, or in this browser where it keeps none. */

import { getJson, offers, sendJson } from "./api";
import type { Conversation } from "./tree";

export interface Listed {
  id: string;
  title: string;
  updated: number;
  snippet?: string | null;
}

export interface Keeper {
  list(query: string): Promise<Listed[]>;
  ids(): Promise<string[]>; // of all there are
  get(id: string): Promise<Conversation>;
  /** What was kept, with its new revision. */
  put(conversation: Conversation): Promise<Conversation>;
  remove(id: string): Promise<void>;
}

const server: Keeper = {
  async list(query) {
    const q = query ? `&q=${encodeURIComponent(query)}` : "";
    return (await getJson<{ data: Listed[] }>(`/v1/conversations?limit=1000${q}`)).data;
  },
  async ids() {
    const found: string[] = [];
    for (;;) {
      const after = found.length ? `&after=${found.at(-1)}` : "";
      const page = await getJson<{ data: Listed[]; has_more: boolean }>(
        `/v1/conversations?limit=1000${after}`,
      );
      found.push(...page.data.map(({ id }) => id));
      if (!page.has_more) return found;
    }
  },
  get: (id) => getJson<Conversation>(`/v1/conversations/${id}`),
  async put(conversation) {
    const { id, title, system, settings, knowledge_base, nodes, selected, revision } = conversation;
    // What is new stands on revision 0; what another window wrote meanwhile is not overwritten.
    const body = { title, system, settings, knowledge_base, nodes, selected, revision: revision ?? 0 };
    const kept = await sendJson<{ revision: number }>("PUT", `/v1/conversations/${id}`, body);
    return { ...conversation, revision: kept.revision };
  },
  async remove(id) {
    await sendJson("DELETE", `/v1/conversations/${id}`);
  },
};

function store(mode: IDBTransactionMode): Promise<IDBObjectStore> {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("khaosz", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () =>
      resolve(opening.result.transaction("conversations", mode).objectStore("conversations"));
  });
}

function done<T>(asked: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

type Kept = Conversation & { updated: number };

const browser: Keeper = {
  async list(query) {
    const all = (await done((await store("readonly")).getAll())) as Kept[];
    const wanted = query.toLowerCase();
    return all
      .filter(
        (each) =>
          each.title.toLowerCase().includes(wanted) ||
          each.nodes.some((node) => node.content.toLowerCase().includes(wanted)),
      )
      .sort((a, b) => b.updated - a.updated)
      .map(({ id, title, updated }) => ({ id, title, updated }));
  },
  async ids() {
    return (await this.list("")).map(({ id }) => id);
  },
  async get(id) {
    const { updated: _, ...conversation } = (await done((await store("readonly")).get(id))) as Kept;
    return conversation;
  },
  async put(conversation) {
    const kept: Kept = { ...conversation, updated: Math.floor(Date.now() / 1000) };
    await done((await store("readwrite")).put(kept));
    return conversation;
  },
  async remove(id) {
    await done((await store("readwrite")).delete(id));
  },
};

export function keeper(): Keeper {
  return offers.value.conversations ? server : browser;
}
