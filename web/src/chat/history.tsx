import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { Dialog } from "../components/dialog";
import { Icon } from "../components/icons";
import { t } from "../i18n";
import type { Listed } from "../conversationStorage";
import { href } from "../router";
import { remove, retitle, startNewChat } from "./persistence";
import {
  conversations, current, listMore, moreConversations, refreshList, search, searchList,
} from "./state"; // prettier-ignore

export function History(props: { onNavigate: () => void }) {
  const dialog = useSignal<{ action: "rename" | "delete"; item: Listed } | null>(null);
  useEffect(() => {
    const timer = setTimeout(() => void refreshList().catch(() => undefined), 150);
    return () => clearTimeout(timer);
  }, [search.value]);
  return (
    <section class="history" aria-label={t("conversations")}>
      <button
        type="button"
        class="new"
        onClick={() => {
          startNewChat();
          props.onNavigate();
        }}
      >
        <Icon name="plus" /> {t("newChat")}
      </button>
      <label class="search">
        <Icon name="search" />
        <span class="sr-only">{t("searchChats")}</span>
        <input
          type="search"
          placeholder={t("searchChats")}
          maxLength={256} // the server's limit; a longer query would be rejected
          value={search.value}
          onInput={(event) => searchList(event.currentTarget.value)}
        />
      </label>
      {!conversations.value.length && (
        <p class="note">{t(search.value ? "noResults" : "noChats")}</p>
      )}
      <ul>
        {conversations.value.map((each) => (
          <li key={each.id} class={each.id === current.value.id ? "open" : ""}>
            <a
              href={href("chat", each.id)}
              aria-current={each.id === current.value.id ? "page" : undefined}
              onClick={props.onNavigate}
            >
              <span dir="auto">{each.title || t("newChat")}</span>
              {each.snippet && <small dir="auto">{each.snippet}</small>}
            </a>
            <button
              type="button"
              class="quiet"
              aria-label={`${t("rename")}: ${each.title}`}
              title={t("rename")}
              onClick={() => (dialog.value = { action: "rename", item: each })}
            >
              <Icon name="edit" />
            </button>
            <button
              type="button"
              class="quiet"
              aria-label={`${t("delete")}: ${each.title}`}
              title={t("delete")}
              onClick={() => (dialog.value = { action: "delete", item: each })}
            >
              <Icon name="trash" />
            </button>
          </li>
        ))}
        {moreConversations.value && <More />}
      </ul>
      {dialog.value && <EditDialog {...dialog.value} onClose={() => (dialog.value = null)} />}
    </section>
  );
}

/** Lists more when it is scrolled into view; a button for the keyboard. */
function More() {
  const item = useRef<HTMLLIElement>(null);
  const more = () => void listMore().catch(() => undefined);
  useEffect(() => {
    const observer = new IntersectionObserver(([entry]) => entry?.isIntersecting && more());
    observer.observe(item.current!);
    return () => observer.disconnect();
  }, [conversations.value.length]); // again, if the new entries leave it in view
  return (
    <li ref={item} class="more">
      <button type="button" onClick={more}>
        {t("listMore")}
      </button>
    </li>
  );
}

function EditDialog(props: { action: "rename" | "delete"; item: Listed; onClose: () => void }) {
  const { action, item } = props;
  const title = useSignal(item.title);
  const submit = (event: Event) => {
    event.preventDefault();
    props.onClose();
    void (action === "delete" ? remove(item.id) : retitle(item.id, title.value.trim()));
  };
  return (
    <Dialog title={t(action === "delete" ? "deleteChat" : "rename")} onClose={props.onClose}>
      <form class="form" onSubmit={submit}>
        {action === "delete" ? (
          <p>{item.title}</p>
        ) : (
          <input
            autofocus
            aria-label={t("rename")}
            maxLength={200}
            value={title.value}
            onInput={(event) => (title.value = event.currentTarget.value)}
          />
        )}
        <div class="editor-row">
          <button type="button" onClick={props.onClose}>
            {t("cancel")}
          </button>
          <button type="submit" class={action === "delete" ? "danger" : "primary"}>
            {t(action === "delete" ? "delete" : "save")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
