/** Knowledge bases and their files, as the server tells of them. */

import { signal } from "@preact/signals";
import { ApiError, getJson, headers, sendJson, Unreachable, type KnowledgeBase } from "../api";
import { explain, refreshBases } from "../chat/state";

export interface FileState {
  id: string;
  name: string;
  bytes: number;
  status: "queued" | "reading" | "embedding" | "ready" | "failed";
  error: string | null;
  code: string | null;
  chunks: number;
  embedded: number;
  created: number;
}

/** A file on its way to the server, or that did not get there. */
export interface Upload {
  key: number;
  file: File;
  base: string;
  sent: number; // of 1
  problem: string | null;
}

export const files = signal<FileState[]>([]);
export const uploads = signal<Upload[]>([]);
export const trouble = signal<string | null>(null); // with what was asked for
export const away = signal<string | null>(null); // with the looks, which come by themselves

const AT_ONCE = 3;
let keys = 0;

function where(base: string, rest = ""): string {
  return `/v1/knowledge_bases/${encodeURIComponent(base)}${rest}`;
}

/** What went wrong is shown; what goes right takes the last trouble of its kind away. */
async function tried<T>(work: () => Promise<T>, kind = trouble): Promise<T | null> {
  try {
    const found = await work();
    kind.value = null;
    return found;
  } catch (error) {
    kind.value = explain(error);
    return null;
  }
}

export async function makeBase(name: string, embedder: string | null): Promise<KnowledgeBase | null> {
  const made = await tried(() =>
    sendJson<KnowledgeBase>("POST", "/v1/knowledge_bases", { name, embedder }),
  );
  await tried(refreshBases, away);
  return made;
}

/** Whether it is gone, and what was on its way to it: a new one of its name has other files. */
export async function removeBase(base: string): Promise<boolean> {
  const answer = await tried(() => sendJson("DELETE", where(base)));
  if (answer !== null) {
    const lost = uploads.value.filter((each) => each.base === base);
    uploads.value = uploads.value.filter((each) => each.base !== base);
    for (const { key } of lost) under.get(key)?.abort();
  }
  await tried(refreshBases, away);
  return answer !== null;
}

let shown: string | null = null;

export async function refreshFiles(base: string): Promise<void> {
  if (base !== shown) files.value = [];
  shown = base;
  const found = await tried(() => getJson<{ data: FileState[] }>(where(base, "/files")), away);
  if (found !== null && shown === base) files.value = found.data;
}

/** While something is being read, which may also fail as a whole. */
export async function lookAgain(base: string): Promise<void> {
  await Promise.all([refreshFiles(base), tried(refreshBases, away)]);
}

export function busy(): boolean {
  return files.value.some((file) => !["ready", "failed"].includes(file.status));
}

export async function removeFile(base: string, file: FileState): Promise<void> {
  await tried(() => sendJson("DELETE", where(base, `/files/${file.id}`)));
  await refreshFiles(base);
}

export function add(base: string, given: Iterable<File>): void {
  const fresh = [...given].map((file) => ({ key: keys++, file, base, sent: 0, problem: null }));
  uploads.value = [...uploads.value, ...fresh];
  next();
}

export function again(upload: Upload): void {
  change(upload.key, { problem: null, sent: 0 });
  next();
}

export function forget(upload: Upload): void {
  uploads.value = uploads.value.filter((each) => each.key !== upload.key);
}

function change(key: number, how: Partial<Upload>): void {
  uploads.value = uploads.value.map((each) => (each.key === key ? { ...each, ...how } : each));
}

const under = new Map<number, XMLHttpRequest>();

function next(): void {
  for (const upload of uploads.value) {
    if (under.size >= AT_ONCE) return;
    if (upload.problem !== null || under.has(upload.key)) continue;
    const sending = new XMLHttpRequest();
    under.set(upload.key, sending);
    void put(upload, sending)
      .then(
        () => forget(upload),
        (error) => change(upload.key, { problem: explain(error) }),
      )
      .finally(async () => {
        under.delete(upload.key);
        if (shown === upload.base) await refreshFiles(upload.base);
        next();
      });
  }
}

/** `fetch` tells nothing of what was sent so far, so this is the older way. */
function put(upload: Upload, sending: XMLHttpRequest): Promise<void> {
  return new Promise((resolve, reject) => {
    sending.open("PUT", where(upload.base, `/files/${encodeURIComponent(upload.file.name)}`));
    for (const [name, value] of Object.entries(headers())) sending.setRequestHeader(name, value);
    sending.setRequestHeader("Content-Type", "application/octet-stream");
    sending.upload.onprogress = ({ loaded, total }) =>
      change(upload.key, { sent: total ? loaded / total : 0 });
    sending.onabort = sending.onerror = () => reject(new Unreachable("upload"));
    sending.onload = () => {
      if (sending.status < 300) return resolve();
      let message = sending.statusText;
      let code = null;
      try {
        ({ message, code } = JSON.parse(sending.responseText).error);
      } catch {
        // what stands before the server answered in its own words
      }
      return reject(new ApiError(sending.status, message, code));
    };
    sending.send(upload.file);
  });
}

