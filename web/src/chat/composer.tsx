import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { offers } from "../api";
import { Icon } from "../components/icons";
import { number, t } from "../i18n";
import { send } from "./asking";
import { update } from "./keeping";
import { answering, bases, choose, current, filled, free, model, models, stop } from "./state";

/**
 * Whether a key is the input method's. While it composes, Enter takes a candidate; Safari sends
 * that keydown after the composition has ended, with the code 229 that all browsers give such keys.
 */
export function composing(event: KeyboardEvent): boolean {
  return event.isComposing || event.keyCode === 229;
}

const text = signal(""); // outlives a look at another view

export function Composer(props: { onTune: () => void }) {
  const area = useRef<HTMLTextAreaElement>(null);
  const fit = () => {
    const { current: element } = area;
    if (element === null) return;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight, innerHeight * 0.4)}px`;
  };
  useEffect(fit, [text.value]);
  useEffect(() => {
    // On a phone the keyboard would come up over what is to be read.
    if (matchMedia("(hover: hover)").matches) area.current?.focus();
  }, [current.value.id]);
  const submit = (event?: Event) => {
    event?.preventDefault();
    if (!text.value.trim() || !free.value) return;
    const message = text.value.trim();
    text.value = "";
    void send(message);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !composing(event)) submit(event);
  };
  const chats = models.value.filter((each) => each.kind === "chat");
  const limit = model.value?.context ?? null;
  return (
    <form class="composer" onSubmit={submit}>
      <textarea
        id="message"
        ref={area}
        rows={1}
        value={text.value}
        placeholder={t("placeholder")}
        aria-label={t("placeholder")}
        onInput={(event) => (text.value = event.currentTarget.value)}
        onKeyDown={onKeyDown}
      />
      <div class="composer-row">
        <label class="picker">
          <span class="sr-only">{t("model")}</span>
          <select
            value={model.value?.id ?? ""}
            onChange={(event) => choose(event.currentTarget.value)}
          >
            {!chats.length && <option value="">{t("noModel")}</option>}
            {chats.map((each) => (
              <option key={each.id} value={each.id}>
                {each.id}
              </option>
            ))}
          </select>
        </label>
        {offers.value.bases && (
          <label class="picker">
            <span class="sr-only">{t("knowledge")}</span>
            <select
              value={current.value.knowledge_base ?? ""}
              onChange={(event) => update({ knowledge_base: event.currentTarget.value || null })}
            >
              <option value="">{t("noKnowledge")}</option>
              {bases.value.map((base) => (
                <option key={base.id} value={base.id}>
                  {base.id}
                </option>
              ))}
            </select>
          </label>
        )}
        <button type="button" class="quiet" aria-label={t("sampling")} title={t("sampling")} onClick={props.onTune}>
          <Icon name="tune" />
        </button>
        {limit !== null && filled.value !== null && <Meter used={filled.value} limit={limit} />}
        <span class="grow" />
        {answering.value ? (
          <button type="button" class="round" aria-label={t("stop")} title={t("stop")} onClick={stop}>
            <Icon name="stop" />
          </button>
        ) : (
          <button
            type="submit"
            class="round"
            aria-label={t("send")}
            title={t("send")}
            disabled={!text.value.trim() || !free.value}
          >
            <Icon name="send" />
          </button>
        )}
      </div>
    </form>
  );
}

function Meter(props: { used: number; limit: number }) {
  const label = t("context", { n: number(props.used), of: number(props.limit) });
  return (
    <span class="meter" title={label}>
      <meter min={0} max={props.limit} high={0.85 * props.limit} value={props.used} aria-label={label} />
      <span>{number((100 * props.used) / props.limit)} %</span>
    </span>
  );
}
