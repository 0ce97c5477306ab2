/** State of knowledge bases, their files and uploads. */

import { signal } from "@preact/signals";
import { ApiError, getJson, headers, sendJson, Unreachable, type KnowledgeBase } from "../api";
import { explain, refreshKnowledgeBases } from "../chat/state";

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

/** A file being uploaded, or whose upload failed. */
export interface Upload {
  key: number;
  file: File;
  knowledgeBase: string;
  progress: number; // 0 to 1
  problem: string | null;
}

export const files = signal<FileState[]>([]);
export const uploads = signal<Upload[]>([]);
export const actionProblem = signal<string | null>(null); // of the user's last action
export const refreshProblem = signal<string | null>(null); // of refreshing in the background

const PARALLEL_UPLOADS = 3;
let nextKey = 0;

function url(name: string, rest = ""): string {
  return `/v1/knowledge_bases/${encodeURIComponent(name)}${rest}`;
}

/** The result, or null on an error, which is shown; a success clears the last error of its kind. */
async function attempt<T>(work: () => Promise<T>, problem = actionProblem): Promise<T | null> {
  try {
    const result = await work();
    problem.value = null;
    return result;
  } catch (error) {
    problem.value = explain(error);
    return null;
  }
}

export async function createKnowledgeBase(
  name: string,
  embedder: string | null,
): Promise<KnowledgeBase | null> {
  const created = await attempt(() =>
    sendJson<KnowledgeBase>("POST", "/v1/knowledge_bases", { name, embedder }),
  );
  await attempt(refreshKnowledgeBases, refreshProblem);
  return created;
}

/** Cancels uploads to it too, which would end up in a new knowledge base of the same name. */
export async function removeKnowledgeBase(name: string): Promise<boolean> {
  const response = await attempt(() => sendJson("DELETE", url(name)));
  if (response !== null) {
    const cancelled = uploads.value.filter((each) => each.knowledgeBase === name);
    uploads.value = uploads.value.filter((each) => each.knowledgeBase !== name);
    for (const { key } of cancelled) active.get(key)?.abort();
  }
  await attempt(refreshKnowledgeBases, refreshProblem);
  return response !== null;
}

let openName: string | null = null;

export async function refreshFiles(name: string): Promise<void> {
  if (name !== openName) files.value = [];
  openName = name;
  const response = await attempt(
    () => getJson<{ data: FileState[] }>(url(name, "/files")),
    refreshProblem,
  );
  if (response === null || openName !== name) return;
  // Chapter 2 before chapter 10.
  const names = new Intl.Collator(undefined, { numeric: true });
  files.value = response.data.toSorted((a, b) => names.compare(a.name, b.name) || a.created - b.created);
}

/** Files and knowledge bases, since ingestion may fail for the knowledge base as a whole. */
export async function refresh(name: string): Promise<void> {
  await Promise.all([refreshFiles(name), attempt(refreshKnowledgeBases, refreshProblem)]);
}

export function isIngesting(): boolean {
  return files.value.some((file) => !["ready", "failed"].includes(file.status));
}

export async function removeFile(name: string, file: FileState): Promise<void> {
  await attempt(() => sendJson("DELETE", url(name, `/files/${file.id}`)));
  await refreshFiles(name);
}

export function upload(knowledgeBase: string, selection: Iterable<File>): void {
  const added = [...selection].map((file) => ({
    key: nextKey++,
    file,
    knowledgeBase,
    progress: 0,
    problem: null,
  }));
  uploads.value = [...uploads.value, ...added];
  startUploads();
}

export function retry(upload: Upload): void {
  change(upload.key, { problem: null, progress: 0 });
  startUploads();
}

export function dismiss(upload: Upload): void {
  uploads.value = uploads.value.filter((each) => each.key !== upload.key);
}

function change(key: number, fields: Partial<Upload>): void {
  uploads.value = uploads.value.map((each) => (each.key === key ? { ...each, ...fields } : each));
}

const active = new Map<number, XMLHttpRequest>();

function startUploads(): void {
  for (const upload of uploads.value) {
    if (active.size >= PARALLEL_UPLOADS) return;
    if (upload.problem !== null || active.has(upload.key)) continue;
    const request = new XMLHttpRequest();
    active.set(upload.key, request);
    void put(upload, request)
      .then(
        () => dismiss(upload),
        (error) => change(upload.key, { problem: explain(error) }),
      )
      .finally(async () => {
        active.delete(upload.key);
        if (openName === upload.knowledgeBase) await refreshFiles(upload.knowledgeBase);
        startUploads();
      });
  }
}

/** By XMLHttpRequest, since `fetch` reports no upload progress. */
function put(upload: Upload, request: XMLHttpRequest): Promise<void> {
  return new Promise((resolve, reject) => {
    request.open("PUT", url(upload.knowledgeBase, `/files/${encodeURIComponent(upload.file.name)}`));
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = ({ loaded, total }) =>
      change(upload.key, { progress: total ? loaded / total : 0 });
    request.onabort = request.onerror = () => reject(new Unreachable("upload"));
    request.onload = () => {
      if (request.status < 300) return resolve();
      let message = request.statusText;
      let code = null;
      try {
        ({ message, code } = JSON.parse(request.responseText).error);
      } catch {
        // the response of a proxy
      }
      return reject(new ApiError(request.status, message, code));
    };
    request.send(upload.file);
  });
}
