import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { Dialog } from "../components/dialog";
import { Icon } from "../components/icons";
import { t } from "../i18n";
import type { Listed } from "../conversationStorage";
import { href } from "../router";
import { remove, retitle, startNewChat } from "./persistence";
import { conversations, current, refreshList, search } from "./state";

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
          onInput={(event) => (search.value = event.currentTarget.value)}
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
              <span>{each.title || t("newChat")}</span>
              {each.snippet && <small>{each.snippet}</small>}
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
      </ul>
      {dialog.value && <EditDialog {...dialog.value} onClose={() => (dialog.value = null)} />}
    </section>
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
