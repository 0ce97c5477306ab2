/** Storage of conversations: on the server, or in this browser if the server stores none. */

import { ApiError, features, getJson, request, sendJson } from "./api";
import type { Conversation } from "./tree";

export interface Listed {
  id: string;
  title: string;
  updated: number; // seconds since the epoch
  snippet?: string | null;
}

export interface ConversationList {
  data: Listed[];
  hasMore: boolean;
}

export interface ConversationStorage {
  /** The newest `count` conversations that match. */
  list(query: string, count: number): Promise<ConversationList>;
  all(): Promise<Conversation[]>;
  get(id: string): Promise<Conversation>;
  /** The stored conversation with its new revision. Throws `ApiError` 409 if it changed meanwhile. */
  put(conversation: Conversation): Promise<Conversation>;
  /** Import conversations with new ids; their times are preserved. */
  add(conversations: Conversation[]): Promise<void>;
  remove(id: string): Promise<void>;
}

const PAGE_SIZE = 1000; // the server's limit
const IMPORT_SIZE = 1 << 20; // characters per request, up to three bytes each; the server takes 4 MB

const serverStorage: ConversationStorage = {
  async list(query, count) {
    const q = query ? `&q=${encodeURIComponent(query)}` : "";
    const found = new Map<string, Listed>(); // one that is saved meanwhile moves to the top
    for (;;) {
      const limit = Math.min(PAGE_SIZE, count - found.size);
      const last = [...found.keys()].at(-1);
      const page = await getJson<{ data: Listed[]; has_more: boolean }>(
        `/v1/conversations?limit=${limit}${last === undefined ? "" : `&after=${last}`}${q}`,
      );
      const size = found.size;
      for (const each of page.data) found.set(each.id, each);
      if (!page.has_more || found.size >= count || found.size === size) {
        return { data: [...found.values()], hasMore: page.has_more };
      }
    }
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
    // New conversations have revision 0. The server rejects an outdated revision, so that changes of
    // another window are not overwritten.
    const body = { title, system, settings, knowledge_base, nodes, selected, revision: revision ?? 0 };
    const saved = await sendJson<{ revision: number }>("PUT", `/v1/conversations/${id}`, body);
    return { ...conversation, revision: saved.revision };
  },
  async add(conversations) {
    const send = (part: Conversation[]) =>
      sendJson("POST", "/v1/conversations/import", { conversations: part });
    let part: Conversation[] = [];
    let size = 0;
    for (const each of conversations) {
      const length = JSON.stringify(each).length;
      if (part.length && size + length > IMPORT_SIZE) {
        await send(part);
        [part, size] = [[], 0];
      }
      part.push(each);
      size += length;
    }
    if (part.length) await send(part);
  },
  async remove(id) {
    await sendJson("DELETE", `/v1/conversations/${id}`);
  },
};

function objectStore(mode: IDBTransactionMode): Promise<IDBObjectStore> {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("khaosz", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("conversations", { keyPath: "id" });
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () =>
      resolve(opening.result.transaction("conversations", mode).objectStore("conversations"));
  });
}

function resultOf<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

type Stored = Conversation & { updated: number };

const browserStorage: ConversationStorage = {
  async list(query, count) {
    const all = (await resultOf((await objectStore("readonly")).getAll())) as Stored[];
    const term = query.toLowerCase();
    const found = all
      .filter(
        (each) =>
          each.title.toLowerCase().includes(term) ||
          each.nodes.some((node) => node.content.toLowerCase().includes(term)),
      )
      .sort((a, b) => b.updated - a.updated)
      .map(({ id, title, updated }) => ({ id, title, updated }));
    return { data: found.slice(0, count), hasMore: found.length > count };
  },
  async all() {
    return (await resultOf((await objectStore("readonly")).getAll())) as Stored[];
  },
  async get(id) {
    const stored: Stored | undefined = await resultOf((await objectStore("readonly")).get(id));
    if (stored === undefined) throw new ApiError(404, "conversation not found");
    const { updated: _, ...conversation } = stored;
    return conversation;
  },
  async put({ base: _, ...conversation }) {
    const store = await objectStore("readwrite"); // one transaction: other windows have to wait
    const before: Stored | undefined = await resultOf(store.get(conversation.id));
    const revision = before?.revision ?? 0;
    if (revision !== (conversation.revision ?? 0)) throw new ApiError(409, "revision conflict");
    const saved = { ...conversation, revision: revision + 1 };
    await resultOf(store.put({ ...saved, updated: Math.floor(Date.now() / 1000) }));
    return saved;
  },
  async add(conversations) {
    for (const each of conversations) {
      const updated = (each as Partial<Stored>).updated ?? Math.floor(Date.now() / 1000);
      await resultOf((await objectStore("readwrite")).put({ ...each, updated }));
    }
  },
  async remove(id) {
    await resultOf((await objectStore("readwrite")).delete(id));
  },
};

export function conversationStorage(): ConversationStorage {
  return features.value.conversations ? serverStorage : browserStorage;
}
