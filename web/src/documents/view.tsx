import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { startAnew, update } from "../chat/keeping";
import { bases, current, models } from "../chat/state";
import { Dialog } from "../components/dialog";
import { Icon } from "../components/icons";
import { number, t } from "../i18n";
import { worded } from "../reasons";
import { go, href, route } from "../router";
import { Finder } from "./finder";
import {
  add,
  again,
  away,
  busy,
  files,
  forget,
  lookAgain,
  makeBase,
  refreshFiles,
  removeBase,
  removeFile,
  trouble,
  uploads,
  type FileState,
} from "./state";

const POLL = 1000; // ms between looks while something is being read

export function DocumentsView() {
  const making = useSignal(false);
  useEffect(() => {
    trouble.value = null;
  }, [route.value.id, making.value]);
  const told = (!making.value && trouble.value) || away.value;
  const open = bases.value.find((each) => each.id === route.value.id) ?? bases.value[0] ?? null;
  return (
    <div class="page">
      <div class="row spread">
        <h1>{t("documents")}</h1>
        <button type="button" onClick={() => (making.value = true)}>
          <Icon name="plus" /> {t("newBase")}
        </button>
      </div>
      {told && (
        <div class="problem" role="alert">
          {told}
        </div>
      )}
      {bases.value.length > 1 && (
        <ul class="tabs">
          {bases.value.map((base) => (
            <li key={base.id}>
              <a href={href("documents", base.id)} aria-current={base === open ? "page" : undefined}>
                {base.id}
              </a>
            </li>
          ))}
        </ul>
      )}
      {open ? (
        <Base key={open.id} id={open.id} />
      ) : (
        <div class="empty">
          <h2>{t("noBases")}</h2>
          <p>{t("noBasesText")}</p>
          <button type="button" class="primary" onClick={() => (making.value = true)}>
            {t("newBase")}
          </button>
        </div>
      )}
      {making.value && <MakeBase onClose={() => (making.value = false)} />}
    </div>
  );
}

function MakeBase(props: { onClose: () => void }) {
  const name = useSignal("");
  const embedders = models.value.filter((each) => each.kind === "embedding");
  const embedder = useSignal(embedders[0]?.id ?? "");
  const submit = async (event: Event) => {
    event.preventDefault();
    const made = await makeBase(name.value.trim(), embedder.value || null);
    if (made === null) return;
    props.onClose();
    go("documents", made.id);
  };
  return (
    <Dialog title={t("newBase")} onClose={props.onClose}>
      <form class="form" onSubmit={submit}>
        <label>
          <span>{t("name")}</span>
          <input
            required
            maxLength={64}
            value={name.value}
            onInput={(event) => (name.value = event.currentTarget.value)}
          />
        </label>
        <label>
          <span>{t("searchBy")}</span>
          <select
            value={embedder.value}
            onChange={(event) => (embedder.value = event.currentTarget.value)}
          >
            <option value="">{t("byWords")}</option>
            {embedders.map((each) => (
              <option key={each.id} value={each.id}>
                {t("byMeaning", { name: each.id })}
              </option>
            ))}
          </select>
        </label>
        {trouble.value && (
          <div class="problem" role="alert">
            {trouble.value}
          </div>
        )}
        <div class="editor-row">
          <button type="button" onClick={props.onClose}>
            {t("cancel")}
          </button>
          <button type="submit" class="primary">
            {t("create")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

function Base(props: { id: string }) {
  const { id } = props;
  const over = useSignal(false);
  const asked = useSignal<"base" | FileState | null>(null);
  const picker = useRef<HTMLInputElement>(null);
  useEffect(() => {
    void refreshFiles(id);
  }, [id]);
  useEffect(() => {
    let over = false;
    let wait = 0;
    // Whatever comes of a look, and however often the page is drawn while a file is sent.
    const look = async () => {
      if (busy()) await lookAgain(id);
      if (!over) wait = window.setTimeout(look, POLL);
    };
    wait = window.setTimeout(look, POLL);
    return () => {
      over = true;
      clearTimeout(wait);
    };
  }, [id]);
  const base = bases.value.find((each) => each.id === id);
  const drop = (event: DragEvent) => {
    event.preventDefault();
    over.value = false;
    if (event.dataTransfer) add(id, event.dataTransfer.files);
  };
  const pick = () => {
    const { current: input } = picker;
    if (input?.files) add(id, input.files);
    if (input) input.value = "";
  };
  const talk = () => {
    startAnew();
    update({ knowledge_base: id });
  };
  const mine = uploads.value.filter((each) => each.base === id);
  return (
    <>
      <div class="row">
        <button
          type="button"
          class="primary"
          disabled={!files.value.some((file) => file.status === "ready")}
          onClick={talk}
        >
          <Icon name="chat" /> {t("askThese")}
        </button>
        <span class="note grow">
          {base?.embedder ? t("byMeaning", { name: base.embedder }) : t("byWords")}
        </span>
        <button type="button" onClick={() => (asked.value = "base")}>
          <Icon name="trash" /> {t("deleteBase")}
        </button>
      </div>
      {base?.error && (
        <div class="problem" role="alert">
          {worded(base.error, base.code)}
        </div>
      )}
      <label
        class={over.value ? "drop over" : "drop"}
        onDragOver={(event) => {
          event.preventDefault();
          over.value = true;
        }}
        onDragLeave={() => (over.value = false)}
        onDrop={drop}
      >
        <Icon name="documents" />
        <span>{t("dropHere")}</span>
        <small>{t("kinds")}</small>
        <input ref={picker} class="sr-only" type="file" multiple aria-label={t("dropHere")} onChange={pick} />
      </label>
      <ul class="files" aria-label={t("files")}>
        {mine.map((upload) => (
          <li key={upload.key} class={upload.problem ? "failed" : ""}>
            <span class="file-name">{upload.file.name}</span>
            <span class="file-state" role={upload.problem ? "alert" : undefined}>
              {upload.problem ?? <progress value={upload.sent} aria-label={t("sending")} />}
            </span>
            {upload.problem && (
              <button type="button" onClick={() => again(upload)}>
                {t("retry")}
              </button>
            )}
            {upload.problem && (
              <button
                type="button"
                class="quiet"
                aria-label={`${t("close")}: ${upload.file.name}`}
                onClick={() => forget(upload)}
              >
                <Icon name="close" />
              </button>
            )}
          </li>
        ))}
        {files.value.map((file) => (
          <li key={file.id} class={file.status}>
            <span class="file-name">{file.name}</span>
            <span class="file-state">
              <State file={file} />
            </span>
            <button
              type="button"
              class="quiet"
              aria-label={`${t("delete")}: ${file.name}`}
              title={t("delete")}
              onClick={() => (asked.value = file)}
            >
              <Icon name="trash" />
            </button>
          </li>
        ))}
      </ul>
      {files.value.some((file) => file.status === "ready") && <Finder base={id} />}
      {asked.value && (
        <Confirm
          what={asked.value === "base" ? id : asked.value.name}
          onClose={() => (asked.value = null)}
          onYes={() => {
            const target = asked.value;
            asked.value = null;
            if (target === "base") {
              void removeBase(id).then((gone) => {
                if (!gone) return;
                if (current.value.knowledge_base === id) update({ knowledge_base: null });
                if (route.value.view === "documents" && route.value.id === id) go("documents");
              });
            } else if (target) void removeFile(id, target);
          }}
        />
      )}
    </>
  );
}

function State(props: { file: FileState }) {
  const { file } = props;
  switch (file.status) {
    case "ready":
      return (
        <>
          {`${size(file.bytes)} · ${t("chunks", { n: number(file.chunks) })}`}
          {file.error && <span class="partly"><Told file={file} /></span>}
        </>
      );
    case "failed":
      return <Told file={file} />;
    case "embedding":
      return (
        <>
          {t("embedding")}{" "}
          <progress max={file.chunks || 1} value={file.embedded} aria-label={t("embedding")} />
        </>
      );
    default:
      return <>{t(file.status)}</>;
  }
}

/** What is wrong; the server's own words have the figures and lines of it. */
function Told(props: { file: FileState }) {
  const { error, code } = props.file;
  const message = error ?? "";
  return <span title={message}>{worded(message, code)}</span>;
}

function size(bytes: number): string {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1_000_000 ? `${number(bytes / 1000)} kB` : `${number(bytes / 1_000_000, 1)} MB`;
}

function Confirm(props: { what: string; onYes: () => void; onClose: () => void }) {
  return (
    <Dialog title={t("deleteThis")} onClose={props.onClose}>
      <p>{props.what}</p>
      <div class="editor-row">
        <button type="button" onClick={props.onClose}>
          {t("cancel")}
        </button>
        <button type="button" class="danger" onClick={props.onYes}>
          {t("delete")}
        </button>
      </div>
    </Dialog>
  );
}
