import { useSignal } from "@preact/signals";
import { useLayoutEffect, useRef } from "preact/hooks";
import type { Citation, Hit } from "../api";
import { Icon } from "../components/icons";
import { Markdown } from "../components/markdown";
import { Inspector, place, SourcePanel } from "../components/sources";
import { number, t } from "../i18n";
import { copyText } from "../platform";
import { siblings, type Node } from "../tree";
import { edit, regenerate } from "./asking";
import { composing } from "./composer";
import { select } from "./keeping";
import { current, free, running, usage } from "./state";

export function Message(props: { node: Node }) {
  const { node } = props;
  return (
    <article class={`message ${node.role}`} aria-label={t(node.role === "user" ? "you" : "assistant")}>
      {node.role === "user" ? <Question node={node} /> : <Answer node={node} />}
    </article>
  );
}

function Question(props: { node: Node }) {
  const { node } = props;
  const editing = useSignal(false);
  if (editing.value) return <Editor node={node} onDone={() => (editing.value = false)} />;
  return (
    <>
      <div class="bubble">{node.content}</div>
      <div class="actions">
        <Versions node={node} />
        <Copy text={node.content} />
        <button
          type="button"
          class="quiet"
          aria-label={t("edit")}
          title={t("edit")}
          disabled={running.value !== null}
          onClick={() => (editing.value = true)}
        >
          <Icon name="edit" />
        </button>
      </div>
    </>
  );
}

function Editor(props: { node: Node; onDone: () => void }) {
  const area = useRef<HTMLTextAreaElement>(null);
  useLayoutEffect(() => {
    area.current?.focus();
    area.current?.setSelectionRange(-1, -1);
  }, []);
  const submit = (event: Event) => {
    event.preventDefault();
    const text = area.current?.value.trim();
    if (!text || !free.value) return;
    props.onDone();
    void edit(props.node, text);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (composing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) submit(event);
    if (event.key === "Escape") props.onDone();
  };
  return (
    <form class="editor" onSubmit={submit}>
      <textarea ref={area} rows={4} aria-label={t("edit")} onKeyDown={onKeyDown}>
        {props.node.content}
      </textarea>
      <div class="editor-row">
        <button type="button" onClick={props.onDone}>
          {t("cancel")}
        </button>
        <button type="submit" class="primary" disabled={!free.value}>
          {t("send")}
        </button>
      </div>
    </form>
  );
}

function Answer(props: { node: Node }) {
  const { node } = props;
  const cited = useSignal<Citation | Hit | null>(null);
  const inspected = useSignal(false);
  const under = running.value?.node === node.id;
  const base = node.retrieval?.knowledge_base ?? current.value.knowledge_base;
  const counted = usage.value[node.id];
  return (
    <>
      {node.reasoning && (
        <details class="thought" open={under && !node.content}>
          <summary>{under && !node.content ? t("thinking") : t("thought")}</summary>
          <Markdown text={node.reasoning} finished={!under || Boolean(node.content)} />
        </details>
      )}
      {node.content ? (
        <Markdown
          text={node.content}
          finished={!under}
          citations={node.citations ?? found(node)}
          onCite={(citation) => (cited.value = citation)}
        />
      ) : (
        under && !node.reasoning && <span class="waiting" aria-hidden="true" />
      )}
      {node.citations !== null && node.citations.length > 0 && (
        <ul class="citations" aria-label={t("sources")}>
          {node.citations.map((each) => (
            <li key={each.number}>
              <button
                type="button"
                aria-label={t("openSource", { n: each.number, doc: each.doc })}
                onClick={() => (cited.value = each)}
              >
                <b>{each.number}</b> {place(each)}
              </button>
            </li>
          ))}
        </ul>
      )}
      {!under && (
        <div class="actions">
          <Versions node={node} />
          <Copy text={node.content} />
          <button
            type="button"
            class="quiet"
            aria-label={t("regenerate")}
            title={t("regenerate")}
            disabled={running.value !== null}
            onClick={() => void regenerate(node)}
          >
            <Icon name="again" />
          </button>
          {node.retrieval && (
            <button
              type="button"
              class="quiet"
              aria-label={t("howFound")}
              title={t("howFound")}
              onClick={() => (inspected.value = true)}
            >
              <Icon name="search" />
            </button>
          )}
          <span class="facts">
            {node.model}
            {counted && ` · ${t("tokens", { n: number(counted.usage.completion_tokens) })}`}
            {counted && counted.usage.completion_tokens > 1 &&
              ` · ${t("perSecond", { n: number(counted.usage.completion_tokens / counted.seconds, 1) })}`}
            {node.finish_reason === "stopped" && ` · ${t("stopped")}`}
            {node.finish_reason === "error" && ` · ${t("brokenOff")}`}
            {node.finish_reason === "length" && ` · ${t("cutShort")}`}
          </span>
        </div>
      )}
      {inspected.value && node.retrieval && (
        <Inspector
          retrieval={node.retrieval}
          onOpen={(hit) => (cited.value = hit)}
          onClose={() => (inspected.value = false)}
        />
      )}
      {cited.value && base !== null && (
        <SourcePanel base={base} citation={cited.value} onClose={() => (cited.value = null)} />
      )}
    </>
  );
}

/** While an answer comes its citations aren't told yet; the passages that it may name are. */
function found(node: Node): Citation[] | null {
  return node.retrieval?.hits.map((hit, i) => ({ ...hit, number: hit.number ?? i + 1 })) ?? null;
}

function Versions(props: { node: Node }) {
  const all = siblings(current.value, props.node);
  const at = all.findIndex((each) => each.id === props.node.id);
  if (all.length < 2) return null;
  const turn = (by: number) => {
    const other = all[at + by];
    if (other) select(other);
  };
  return (
    <span class="versions" role="group" aria-label={t("versionOf", { i: at + 1, n: all.length })}>
      <button
        type="button"
        class="quiet"
        aria-label={t("previous")}
        disabled={at === 0 || running.value !== null}
        onClick={() => turn(-1)}
      >
        <Icon name="left" />
      </button>
      <span aria-hidden="true">
        {at + 1}/{all.length}
      </span>
      <button
        type="button"
        class="quiet"
        aria-label={t("next")}
        disabled={at === all.length - 1 || running.value !== null}
        onClick={() => turn(1)}
      >
        <Icon name="right" />
      </button>
    </span>
  );
}

function Copy(props: { text: string }) {
  const copied = useSignal(false);
  const copy = async () => {
    await copyText(props.text);
    copied.value = true;
    setTimeout(() => (copied.value = false), 1500);
  };
  const label = copied.value ? t("copied") : t("copy");
  return (
    <button type="button" class="quiet" aria-label={label} title={label} onClick={copy}>
      <Icon name={copied.value ? "check" : "copy"} />
    </button>
  );
}
