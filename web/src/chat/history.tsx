import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import { Dialog } from "../components/dialog";
import { Icon } from "../components/icons";
import { t } from "../i18n";
import type { Listed } from "../keep";
import { href } from "../router";
import { remove, retitle, startAnew } from "./keeping";
import { conversations, current, refreshList, search } from "./state";

export function History(props: { onGo: () => void }) {
  const asked = useSignal<{ what: "rename" | "delete"; of: Listed } | null>(null);
  useEffect(() => {
    const wait = setTimeout(() => void refreshList().catch(() => undefined), 150);
    return () => clearTimeout(wait);
  }, [search.value]);
  return (
    <section class="history" aria-label={t("conversations")}>
      <button
        type="button"
        class="new"
        onClick={() => {
          startAnew();
          props.onGo();
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
          maxLength={256} // as the server takes; a list that it refused would show what was there
          value={search.value}
          onInput={(event) => (search.value = event.currentTarget.value)}
        />
      </label>
      {!conversations.value.length && (
        <p class="note">{t(search.value ? "nothingFound" : "noChats")}</p>
      )}
      <ul>
        {conversations.value.map((each) => (
          <li key={each.id} class={each.id === current.value.id ? "open" : ""}>
            <a
              href={href("chat", each.id)}
              aria-current={each.id === current.value.id ? "page" : undefined}
              onClick={props.onGo}
            >
              <span>{each.title || t("newChat")}</span>
              {each.snippet && <small>{each.snippet}</small>}
            </a>
            <button
              type="button"
              class="quiet"
              aria-label={`${t("rename")}: ${each.title}`}
              title={t("rename")}
              onClick={() => (asked.value = { what: "rename", of: each })}
            >
              <Icon name="edit" />
            </button>
            <button
              type="button"
              class="quiet"
              aria-label={`${t("delete")}: ${each.title}`}
              title={t("delete")}
              onClick={() => (asked.value = { what: "delete", of: each })}
            >
              <Icon name="trash" />
            </button>
          </li>
        ))}
      </ul>
      {asked.value && <Ask {...asked.value} onClose={() => (asked.value = null)} />}
    </section>
  );
}

function Ask(props: { what: "rename" | "delete"; of: Listed; onClose: () => void }) {
  const { what, of } = props;
  const title = useSignal(of.title);
  const submit = (event: Event) => {
    event.preventDefault();
    props.onClose();
    void (what === "delete" ? remove(of.id) : retitle(of.id, title.value.trim()));
  };
  return (
    <Dialog title={t(what === "delete" ? "deleteChat" : "rename")} onClose={props.onClose}>
      <form class="form" onSubmit={submit}>
        {what === "delete" ? (
          <p>{of.title}</p>
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
          <button type="submit" class={what === "delete" ? "danger" : "primary"}>
            {t(what === "delete" ? "delete" : "save")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
