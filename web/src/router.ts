/** Routes in the URL fragment: #/chat/ID, #/documents, ... */

import { signal } from "@preact/signals";

export interface Route {
  view: string;
  id: string | null;
}

/** A truncated or hand-written address may be malformed; it is then used as is. */
export function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function read(): Route {
  const [view = "", id = ""] = location.hash.replace(/^#\/?/, "").split("/");
  return { view: view || "chat", id: id ? decoded(id) : null };
}

export const route = signal<Route>(read());

addEventListener("hashchange", () => {
  route.value = read();
});

export function href(view: string, id?: string): string {
  return id === undefined ? `#/${view}` : `#/${view}/${encodeURIComponent(id)}`;
}

export function go(view: string, id?: string): void {
  location.hash = href(view, id);
}

/** Change the address of the current view without a history entry. */
export function rename(view: string, id: string): void {
  history.replaceState(null, "", href(view, id));
  route.value = { view, id };
}
