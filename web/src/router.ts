/** Views by the part behind #: /chat/ID, /documents, ... */

import { signal } from "@preact/signals";

export interface Route {
  view: string;
  id: string | null;
}

/** An address may have been cut short, or written by hand: then it is taken as it is. */
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

/** The same place under another name, without a step in the history. */
export function rename(view: string, id: string): void {
  history.replaceState(null, "", href(view, id));
  route.value = { view, id };
}
