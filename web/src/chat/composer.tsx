import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { features, type PromptSize } from "../api";
import { Icon } from "../components/icons";
import { number, t } from "../i18n";
import { send } from "./generation";
import { update } from "./persistence";
import { canSwitch, isThinking } from "./sampling";
import {
  canGenerate, current, generating, knowledgeBases, model, models, promptSize, selectModel, stop,
} from "./state"; // prettier-ignore

/**
 * Whether a key belongs to an input method. While composing, Enter accepts a candidate; Safari sends
 * that keydown after the composition has ended, with key code 229 as in all browsers.
 */
export function isComposing(event: KeyboardEvent): boolean {
  return event.isComposing || event.keyCode === 229;
}

const text = signal(""); // a draft outlives a visit to another view

export function Composer(props: { onSettings: () => void }) {
  const area = useRef<HTMLTextAreaElement>(null);
  const fitHeight = () => {
    const { current: element } = area;
    if (element === null) return;
    element.style.height = "auto";
    element.style.height = `${Math.min(element.scrollHeight, innerHeight * 0.4)}px`;
  };
  useEffect(fitHeight, [text.value]);
  useEffect(() => {
    // On a phone, focus would open the keyboard over the conversation.
    if (matchMedia("(hover: hover)").matches) area.current?.focus();
  }, [current.value.id]);
  const submit = (event?: Event) => {
    event?.preventDefault();
    if (!text.value.trim() || !canGenerate.value) return;
    const message = text.value.trim();
    text.value = "";
    void send(message);
  };
  const onKeyDown = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !isComposing(event)) submit(event);
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
        placeholder={t("message")}
        aria-label={t("message")}
        onInput={(event) => (text.value = event.currentTarget.value)}
        onKeyDown={onKeyDown}
      />
      <div class="composer-row">
        <label class="picker">
          <span class="sr-only">{t("model")}</span>
          <select
            value={model.value?.id ?? ""}
            onChange={(event) => selectModel(event.currentTarget.value)}
          >
            {!chats.length && <option value="">{t("noModel")}</option>}
            {chats.map((each) => (
              <option key={each.id} value={each.id}>
                {each.id}
              </option>
            ))}
          </select>
        </label>
        {features.value.knowledgeBases && (
          <label class="picker">
            <span class="sr-only">{t("knowledgeBase")}</span>
            <select
              value={current.value.knowledge_base ?? ""}
              onChange={(event) => update({ knowledge_base: event.currentTarget.value || null })}
            >
              <option value="">{t("noKnowledgeBase")}</option>
              {knowledgeBases.value.map((base) => (
                <option key={base.id} value={base.id}>
                  {base.id}
                </option>
              ))}
            </select>
          </label>
        )}
        {canSwitch(model.value) && <ThinkingSwitch />}
        <button type="button" class="quiet" aria-label={t("chatSettings")} title={t("chatSettings")} onClick={props.onSettings}>
          <Icon name="tune" />
        </button>
        {limit !== null && promptSize.value !== null && <Meter {...contextUse(promptSize.value, limit)} />}
        <span class="grow" />
        {generating.value ? (
          <button type="button" class="round" aria-label={t("stop")} title={t("stop")} onClick={stop}>
            <Icon name="stop" />
          </button>
        ) : (
          <button
            type="submit"
            class="round"
            aria-label={t("send")}
            title={t("send")}
            disabled={!text.value.trim() || !canGenerate.value}
          >
            <Icon name="send" />
          </button>
        )}
      </div>
    </form>
  );
}

/** Of this conversation; the template of the model has it. */
function ThinkingSwitch() {
  const { settings } = current.value;
  const on = isThinking(model.value, settings);
  return (
    <button
      type="button"
      class="quiet switch"
      aria-pressed={on}
      title={t("thinkingHint")}
      onClick={() => update({ settings: { ...settings, thinking: !on } })}
    >
      <Icon name="thought" /> <span>{t("thinkingSwitch")}</span>
    </button>
  );
}

/** How full the context is, as a fraction, and a sentence that says what is counted. */
export function contextUse(size: PromptSize, limit: number): { fraction: number; label: string } {
  const used = t("contextUsed", { n: number(size.count), of: number(limit) });
  const label = size.left_out ? `${used} ${t("contextLeftOut", { n: number(size.left_out) })}` : used;
  return { fraction: Math.min(1, size.count / Math.max(1, limit)), label };
}

function Meter(props: { fraction: number; label: string }) {
  const { fraction, label } = props;
  return (
    <span class="meter" title={label}>
      <span class="meter-name">{t("context")}</span>
      <meter min={0} max={1} high={0.85} value={fraction} aria-label={label} />
      <span aria-hidden="true">{number(100 * fraction)} %</span>
    </span>
  );
}
