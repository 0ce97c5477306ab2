/** Where conversations are kept: with the server, or in this browser where it keeps none. */

import { ApiError, getJson, offers, request, sendJson } from "./api";
import type { Conversation } from "./tree";

export interface Listed {
  id: string;
  title: string;
  updated: number;
  snippet?: string | null;
}

export interface Keeper {
  list(query: string): Promise<Listed[]>;
  all(): Promise<Conversation[]>;
  get(id: string): Promise<Conversation>;
  /** What was kept, with its new revision. */
  put(conversation: Conversation): Promise<Conversation>;
  /** Those of a file, which have ids of their own, with their times. */
  add(conversations: Conversation[]): Promise<void>;
  remove(id: string): Promise<void>;
}

const PART = 1 << 20; // characters of an import, of up to three bytes; the server takes 4 MB at once

const server: Keeper = {
  async list(query) {
    const q = query ? `&q=${encodeURIComponent(query)}` : "";
    return (await getJson<{ data: Listed[] }>(`/v1/conversations?limit=1000${q}`)).data;
  },
  async all() {
    const lines = await (await request("/v1/conversations/export")).text();
    return lines
      .split("\n")
      .filter(Boolean)
      .map((line) => JSON.parse(line));
  },
  get: (id) => getJson<Conversation>(`/v1/conversations/${id}`),
  async put(conversation) {
    const { id, title, system, settings, knowledge_base, nodes, selected, revision } = conversation;
    // What is new stands on revision 0; what another window wrote meanwhile is not overwritten.
    const body = { title, system, settings, knowledge_base, nodes, selected, revision: revision ?? 0 };
    const kept = await sendJson<{ revision: number }>("PUT", `/v1/conversations/${id}`, body);
    return { ...conversation, revision: kept.revision };
  },
  async add(conversations) {
    const send = (part: Conversation[]) =>
      sendJson("POST", "/v1/conversations/import", { conversations: part });
    let part: Conversation[] = [];
    let size = 0;
    for (const each of conversations) {
      const more = JSON.stringify(each).length;
      if (part.length && size + more > PART) {
        await send(part);
        [part, size] = [[], 0];
      }
      part.push(each);
      size += more;
    }
    if (part.length) await send(part);
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
  async all() {
    return (await done((await store("readonly")).getAll())) as Kept[];
  },
  async get(id) {
    const kept: Kept | undefined = await done((await store("readonly")).get(id));
    if (kept === undefined) throw new ApiError(404, "there is no such conversation");
    const { updated: _, ...conversation } = kept;
    return conversation;
  },
  async put({ base: _, ...conversation }) {
    const at = await store("readwrite"); // one transaction: no other window comes in between
    const before: Kept | undefined = await done(at.get(conversation.id));
    const revision = before?.revision ?? 0;
    if (revision !== (conversation.revision ?? 0)) throw new ApiError(409, "it went on elsewhere");
    const kept = { ...conversation, revision: revision + 1 };
    await done(at.put({ ...kept, updated: Math.floor(Date.now() / 1000) }));
    return kept;
  },
  async add(conversations) {
    for (const each of conversations) {
      const updated = (each as Partial<Kept>).updated ?? Math.floor(Date.now() / 1000);
      await done((await store("readwrite")).put({ ...each, updated }));
    }
  },
  async remove(id) {
    await done((await store("readwrite")).delete(id));
  },
};

export function keeper(): Keeper {
  return offers.value.conversations ? server : browser;
}
